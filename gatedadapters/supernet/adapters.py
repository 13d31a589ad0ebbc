"""The supernet's life: train with a penalty, discretize, prune or compact, detach."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatedadapters.backbone import Layout
from gatedadapters.backbone.attached import apply_requires_grad
from gatedadapters.backbone.fingerprint import Fingerprint
from gatedadapters.config import Budget, Penalty, Schedule, SearchSpace
from gatedadapters.errors import AttachError, TaskError, TrainingError
from gatedadapters.gates import GateBank, Pressure
from gatedadapters.paths import Path, SkippedSite
from gatedadapters.structure import Structure
from gatedadapters.structure import folder as saving
from gatedadapters.structure.discretize import build_structure, choose_units, kept_mask
from gatedadapters.supernet import merging
from gatedadapters.supernet.hooks import (
    RUNNING,
    ModelHook,
    OutputAnchor,
    hook_embedding,
    new_serial,
    place,
    point_hooks,
)
from gatedadapters.supernet.routing import checked_ids
from gatedadapters.supernet.weight_hooks import hook_weights, restore

NAME = "gated_adapters"


class Adapters(nn.Module):
    """All trainable state that `attach` puts into a model, registered there as `gated_adapters`.

    Attributes:
        paths: the paths by key, `module/name:kind`.
        bank: the gates; None once compact.
        tasks: task names; task ids are positions in it.
        skipped_sites: selected places where a candidate could not go, and why.
        merged: what `merge` reported, None while the paths run beside the backbone.
        follows_ids: whether `task_ids` of a call say which task is meant; False where they are the model's own alone.
    """

    follows_ids = True
    paths: nn.ModuleDict
    bank: GateBank | None
    pressure: Pressure | None

    def __init__(
        self, paths: Mapping[str, Path], *, tasks: Sequence[str], space: SearchSpace, identity: Fingerprint, seed: int
    ) -> None:
        super().__init__()
        self.paths = nn.ModuleDict(paths)
        self.bank = None
        self.pressure = None
        self.tasks, self.space, self.identity, self.seed = tuple(tasks), space, identity, seed
        self.skipped_sites: tuple[SkippedSite, ...] = ()
        self.layout: Layout | None = None
        self.structure: Structure | None = None
        self.head_names: tuple[str, ...] = ()
        self.merged: merging.MergeReport | None = None
        self.aside = nn.ParameterList()  # on a shelf: their heads while others are at work, else the model's own
        self.replaced: dict[str, Tensor] = {}  # while merged: the originals of the weights that were written to
        self.tapped: dict[str, Tensor] = {}
        self.cut: dict[str, Any] = {}  # calls of experts under way, one task after the other
        self._task: int | None = 0 if len(self.tasks) == 1 else None
        self.routed: int | Tensor | None = None  # task of the present batch, or of each example; None: nothing said so
        self._distinct: tuple[Tensor, tuple[int, ...]] | None = None
        self._model: list[nn.Module] = []  # a list, so that the backbone is not registered as a child of its own child
        self._handles: list[Any] = []
        self._required_grad: frozenset[str] = frozenset()
        self.serial, self._enabled = new_serial(self), True
        self.announce()
        nn.Module.register_load_state_dict_post_hook(self, _follow_loaded_gates)

    # -- what the hooks call -------------------------------------------------------------------------------------------

    def begin_forward(self, task_ids: Tensor | None, batch: int | None = None) -> None:
        """Called before each forward of the model: checks task ids and begins a new step if the gates have moved."""
        self.tapped.clear()
        given = task_ids if self.follows_ids else None
        self.routed = self._task if given is None else checked_ids(self._model, self.tasks, given, batch)
        if self.merged is not None:
            merging.check_call(self, self.merged.task, self.routed)
        bank = self.bank
        if bank is not None and self.training and torch.is_grad_enabled() and bank.step_is_new():
            bank.draw()
            if self.pressure is not None:
                if self.pressure.prune_is_due(bank):
                    self.prune(self.discretize())
                else:
                    self.pressure.ascend(bank)
        if bank is not None:
            bank.refresh()  # compiled code takes what it finds

    def end_forward(self) -> None:
        """Called after each forward of the model. What is called by itself next, as `generate` calls an encoder, goes
        by the task that is set, not by that call's ids; where a backward may come, checkpointed blocks need those.
        """
        if not torch.is_grad_enabled():
            self.routed = self._task

    def gate(self, key: str) -> tuple[bool, Tensor | None]:
        """(whether path `key` is open, its gate for the present batch: None, (g,) or (batch, g))."""
        per_task = self.bank.take(key) if self.bank is not None else cast(Path, self.paths[key]).routing
        if per_task is None:
            return self.bank is None, None
        if len(self.tasks) == 1:
            return True, per_task[0]
        if self.routed is None:
            raise TaskError(
                "this model holds several tasks, and the call does not say which",
                expected=f"task_ids among 0..{len(self.tasks) - 1} ({', '.join(self.tasks)})",
                got="none",
                where="forward",
                fix="pass task_ids=LongTensor (batch,), or call adapters.set_task(name)",
            )
        task = self.routed
        return True, per_task[task] if isinstance(task, int) else per_task[task.to(per_task.device)]

    def tasks_of_batch(self) -> tuple[int, ...]:
        """The tasks that the present batch has examples of."""
        routed = self.routed
        if isinstance(routed, Tensor):
            if self._distinct is None or self._distinct[0] is not routed:  # one host read a batch, not one a module
                self._distinct = routed, tuple(routed.unique().tolist())
            return self._distinct[1]
        return () if routed is None else (routed,)

    @contextmanager
    def routed_to(self, task: int | None) -> Iterator[None]:
        """Within this context the present batch counts as one of this task."""
        before, self.routed = self.routed, task
        try:
            yield
        finally:
            self.routed = before

    def checkpointing(self) -> bool:
        """Whether the model checkpoints activations while training."""
        return self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())

    # -- training ------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model these adapters are attached to."""
        if not self._model:
            raise AttachError("these adapters are detached", fix="attach again, or load a saved structure")
        return self._model[0]

    def set_task(self, task: str | int | None) -> None:
        """Use one task for every example of a call that carries no `task_ids`.

        Raises:
            TaskError: unknown task.
        """
        number = self.tasks.index(task) if task in self.tasks else task
        if number is not None and number not in range(len(self.tasks)):
            raise TaskError(
                expected=f"one of {', '.join(self.tasks)}, or 0..{len(self.tasks) - 1}",
                got=repr(task),
                where="set_task",
                fix="name a task",
            )
        self._task = cast("int | None", number)
        self.routed = self._task  # for parts of the model called by themselves, as generation calls an encoder

    @property
    def enabled(self) -> bool:
        """False switches every path off, leaving the backbone."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self._enabled = value
        self.announce()

    def announce(self) -> None:
        """Say whether paths run."""
        RUNNING[self.serial] = self._enabled and self.merged is None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model computes what the backbone alone does."""
        before, self.enabled = self.enabled, False
        if before:
            merging.exchange(self)
        try:
            yield
        finally:
            self.enabled = before
            if before:
                merging.exchange(self)

    def set_penalty(
        self, penalty: Penalty, *, schedule: Schedule | None = None, total_steps: int | None = None
    ) -> None:
        """Choose what holds the adapter small; `total_steps` counts optimiser steps and is needed for a budget.

        After a prune gates no longer learn: a smaller budget is then met at once, by the gates as they were.

        Raises:
            BudgetError: the budget is below the smallest candidate, or the length of training is unknown.
            AttachError: the adapters are compact and have no gates.
        """
        bank = self._gates()
        self.pressure = Pressure(bank, penalty, schedule or Schedule(), total_steps=total_steps)
        if bank.frozen and isinstance(penalty, Budget):
            kept = choose_units(bank, penalty)
            if bool((kept < (bank.kept > 0)).any()):
                self.prune(self._structure(kept, penalty))

    def penalty(self) -> Tensor:
        """The term to add to the task loss: a differentiable scalar, the same for each micro-batch of a step.

        Raises:
            TrainingError: no penalty was chosen.
        """
        if self.pressure is None or self.bank is None:
            raise TrainingError(
                "there is no penalty to compute",
                expected="set_penalty(L0(...) or Budget(...)) before training",
                got="none set",
                where="adapters.penalty",
                fix="pass penalty= to attach, or call adapters.set_penalty",
            )
        return self.pressure.term(self.bank)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The gates: a learning rate of their own, no weight decay."""
        return [] if self.bank is None else [self.bank.log_alpha]

    def weight_parameters(self) -> list[nn.Parameter]:
        """What the paths learn."""
        return [p for p in self.paths.parameters() if p.requires_grad]

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the model's own task heads, trained and saved along."""
        if self.aside and not self._model:
            return list(self.aside)
        return [self.model.get_parameter(name) for name in self.head_names]

    def _gates(self) -> GateBank:
        if self.bank is None:
            raise AttachError(
                "these adapters are compact: their gates are folded into the weights",
                fix="attach the search space anew",
            )
        return self.bank

    # -- the discrete result -------------------------------------------------------------------------------------------

    def discretize(self, budget: Budget | None = None, *, scores: Tensor | None = None) -> Structure:
        """The hard rule that turns gates into a Structure; nothing is changed.

        Without a budget: a unit stays where its test-time gate is above 0. With one: units are taken in order of
        `scores` (default: the probability of being open), skipping what no longer fits, until nothing does.

        Args:
            budget: what the Structure may cost at most; default: the one trained under, if any.
            scores: (tasks, units), higher is kept first; e.g. random numbers for a control at equal budget.

        Raises:
            BudgetError: the budget is below the smallest candidate.
        """
        bank = self._gates()
        if budget is None and self.pressure is not None and isinstance(self.pressure.penalty, Budget):
            budget = self.pressure.penalty
        return self._structure(choose_units(bank, budget, scores), budget)

    def _structure(self, kept: Tensor, budget: Budget | None) -> Structure:
        paths = cast(Mapping[str, Path], self.paths)
        return build_structure(
            self._gates(),
            kept,
            paths,
            tasks=self.tasks,
            space=self.space,
            budget=budget,
            identity=self.identity,
            seed=self.seed,
        )

    @torch.no_grad()
    def prune(self, structure: Structure) -> None:
        """Fix the gates to `structure` and go on training its weights: what is dropped is closed for good, what stays
        is open without noise. Parameters keep their shapes, so the optimiser goes on; `compact` later shrinks them.

        A single task's gates move into the weights, and what is dropped is condensed into what stays where a path can
        (`Path.condense`): the function stays what it was, but for what the budget cut off. Of several tasks' gates the
        largest moves and the ratios remain as routing. A unit kept with a gate of 0 starts from a zero contribution;
        where another task's gate is open, from that task's, for a routing of 0 could not learn.
        """
        bank = self._gates()
        kept = kept_mask(structure, bank, self.typed_paths(), self.tasks)
        gates = bank.deterministic()
        values = gates * kept
        top = values.amax(0)
        for key, path in self.typed_paths():
            where = bank.slices[key]
            own = kept[:, where].amax(0).expand(path.units)
            if len(self.tasks) == 1:
                path.condense(own.nonzero().flatten(), gates[0, where].expand(path.units))
            else:
                path.scale_units(top[where].expand(path.units))
        if len(self.tasks) == 1:
            bank.fix(kept)
        else:
            bank.fix(torch.where(values > 0, values / top.clamp(min=1e-30), kept))
        self.structure = structure

    @torch.no_grad()
    def compact(self, structure: Structure | None = None, *, task: str | None = None) -> Structure:
        """Shrink to `structure` (default: the pruned one, else `discretize()`), in place: what stays, gates folded.

        Args:
            structure: made by `discretize` on these adapters.
            task: keep this task alone.

        Returns:
            The structure now in place.

        Raises:
            AttachError: already compact, or the structure names other candidates.
        """
        bank, model = self._gates(), self.model
        structure = structure or self.structure or self.discretize()
        if task is not None:
            structure = structure.for_task(task)
        kept = kept_mask(structure, bank, self.typed_paths(), self.tasks)
        if self.structure is not structure:
            self.prune(structure)
        values = bank.kept * kept
        rows = [self.tasks.index(name) for name in structure.tasks]
        survivors = {}
        for record in structure.paths:
            path = cast(Path, self.paths[record.key])
            units = torch.tensor(record.kept, device=values.device)
            own = values[:, bank.slices[record.key]].expand(-1, path.units)[:, units]
            path.select_units(units)
            path.options = record.options
            if len(rows) > 1:
                path.routing = own[rows].clone()
            else:
                path.scale_units(own[rows[0]])
            survivors[record.key] = path
        self._unhook()
        self.paths = nn.ModuleDict(survivors)
        self.bank = self.pressure = None
        self.tasks, self.structure = structure.tasks, structure
        self._task = 0 if len(self.tasks) == 1 else None
        self._hook(model)
        return structure

    def merge(self, task: str | None = None) -> merging.MergeReport:
        """Fold compact adapters into the backbone's own weights, in place: no path runs, a forward costs what the
        backbone's alone does. `unmerge` takes them out again bit for bit, `disabled` does so for a while.

        Sums are rounded once, to the type that the weight has. The originals stay in memory beside the model: as many
        bytes as the weights written to (`MergeReport.bytes`).

        Args:
            task: the task to merge, where there are several.

        Returns:
            What rounding lost, by weight. Merging again what is merged changes nothing and returns the same.

        Raises:
            AttachError: not compact, disabled, on a shelf, or another task's are merged; a weight is shared, quantised,
                on the meta device, or of a module that computes more than a linear map.
            PathError: a path is of a kind that no weight can stand in for.
            TaskError: several tasks, and none of them named.
            ArtifactError: a merged value would not be finite.

        Nothing is changed by any of them.
        """
        report = merging.merge(self, task, keep=True)
        self.announce()
        return report

    def unmerge(self) -> None:
        """Put the originals of merged weights back, every bit of them; nothing to do where nothing is merged.

        Raises:
            AttachError: within `disabled`.
        """
        if self.merged is not None:
            merging.unmerge(self)
            self.announce()

    def merge_and_detach(self, task: str | None = None) -> merging.MergeReport:
        """Fold compact adapters into the backbone and go: the model is a plain one of its class with other weights, to
        be saved with `save_pretrained`. No originals are kept: there is no way back. Otherwise as `merge`.
        """
        report = merging.merge(self, task, keep=False)
        self.replaced.clear()
        self.merged = None
        self.detach()
        return report

    def save(self, folder: str | FilePath, *, dtype: torch.dtype = torch.float32, overwrite: bool = False) -> None:
        """Write compact adapters and task heads into `folder`: `structure.json` and `adapters.safetensors`, whole or
        not at all. `load_adapters` reads them back.

        Args:
            folder: a new or an empty folder.
            dtype: of what is stored, float32 or bfloat16.
            overwrite: replace an artefact that the folder holds, in one step.

        Raises:
            ArtifactError: the adapters are not compact, or the folder is not free.
        """
        saving.save(self, folder, dtype=dtype, overwrite=overwrite)

    def typed_paths(self) -> Iterator[tuple[str, Path]]:
        """The paths by key."""
        for key, path in self.paths.items():
            yield key, cast(Path, path)

    # -- in and out of the model ---------------------------------------------------------------------------------------

    def _hook(self, model: nn.Module) -> None:
        accepts = "task_ids" in inspect.signature(model.forward).parameters
        self._handles.append(
            model.register_forward_pre_hook(ModelHook(self, pop_task_ids=not accepts), with_kwargs=True)
        )
        self._handles.append(model.register_forward_hook(OutputAnchor(self)))
        self._handles += hook_embedding(self, model)
        for name, hook in point_hooks(self):
            self._handles.append(place(hook, model.get_submodule(name)))
        self._handles += hook_weights(self, model)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.tapped.clear()
        self.cut.clear()
        for _, path in self.typed_paths():  # a forward that the keyboard interrupted may have left something
            if path.site.at_weight and self._model:
                restore(self.model.get_submodule(path.site.host), [path.site.weight_name])

    def check_alone(self) -> nn.Module:
        """The model, unless these adapters are on a shelf, and the model not theirs alone to change."""
        model = self.model
        if getattr(model, NAME) is not self:
            fix = "shelf.detach(), then load_adapters(model, folder) for these alone"
            raise AttachError("these adapters are on a shelf", where="merge / detach", fix=fix)
        return model

    def detach(self) -> nn.Module:
        """Take everything out of the model again; every bit, hook and `requires_grad` of it is as before `attach`. A
        sparse delta that stays in it keeps the backbone frozen.

        Task heads keep what they learned.
        """
        model = self.check_alone()
        self.unmerge()
        self._unhook()
        delattr(model, NAME)
        apply_requires_grad(model, self._required_grad)
        self._model.clear()
        return model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tapped": {}, "cut": {}, "_distinct": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self.serial = new_serial(self)
        self.announce()


def get_adapters(model: nn.Module) -> Adapters:
    """The adapters attached to `model` (or to what DDP and torch.compile wrapped).

    Raises:
        AttachError: it has none.
    """
    for module in model.modules():
        found = getattr(module, NAME, None)
        found = getattr(found, "current", found)  # of a shelf, the active ones
        if isinstance(found, Adapters):
            return found
    raise AttachError("this model has no adapters", where=type(model).__name__, fix="call gatedadapters.attach first")


def _follow_loaded_gates(adapters: Adapters, incompatible: Any) -> None:
    """After a state dict was loaded: fixed gates have a Structure, gates that still learn have none."""
    bank, penalty = adapters.bank, adapters.pressure.penalty if adapters.pressure is not None else None
    if bank is not None:
        budget = penalty if isinstance(penalty, Budget) else None
        adapters.structure = adapters._structure((bank.kept > 0).float(), budget) if bank.frozen else None
