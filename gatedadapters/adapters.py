"""The supernet's life: train with a penalty, discretize, prune or compact, detach."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatedadapters import saving
from gatedadapters.backbone import Layout
from gatedadapters.config import Budget, Penalty, Schedule, SearchSpace
from gatedadapters.errors import AttachError, TaskError, TrainingError
from gatedadapters.gates import GateBank, Pressure
from gatedadapters.hooks import EmbeddingHook, InputHook, ModelHook, OutputAnchor, OutputHook
from gatedadapters.paths import Misfit, Path
from gatedadapters.selection import build_structure, choose_units
from gatedadapters.structure import Fingerprint, Structure

NAME = "gated_adapters"


class Adapters(nn.Module):
    """All trainable state that `attach` puts into a model, registered there as `gated_adapters`.

    Attributes:
        paths: the paths by key, `module/name:kind`.
        bank: the gates; None once compact.
        tasks: task names; task ids are positions in it.
        misfits: selected places where a candidate could not go, and why.
        enabled: False switches every path off, leaving the backbone.
    """

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
        self.misfits: tuple[Misfit, ...] = ()
        self.layout: Layout | None = None
        self.structure: Structure | None = None
        self.head_names: tuple[str, ...] = ()
        self.enabled = True
        self.tapped: dict[str, Tensor] = {}
        self._task: int | None = 0 if len(self.tasks) == 1 else None
        self._routed: int | Tensor | None = None
        self._model: list[nn.Module] = []  # a list, so that the backbone is not registered as a child of its own child
        self._handles: list[Any] = []
        self._required_grad: frozenset[str] = frozenset()
        nn.Module.register_load_state_dict_post_hook(self, _follow_loaded_gates)

    # -- what the hooks call -------------------------------------------------------------------------------------------

    def begin_forward(self, task_ids: Tensor | None, batch: int | None = None) -> None:
        """Called before each forward of the model: checks task ids and begins a new step if the gates have moved."""
        self.tapped.clear()
        self._routed = self._task if task_ids is None else self._checked_ids(task_ids, batch)
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

    def gate(self, key: str) -> tuple[bool, Tensor | None]:
        """(whether path `key` is open, its gate for the present batch: None, (g,) or (batch, g))."""
        per_task = self.bank.take(key) if self.bank is not None else cast(Path, self.paths[key]).routing
        if per_task is None:
            return self.bank is None, None
        if len(self.tasks) == 1:
            return True, per_task[0]
        if self._routed is None:
            raise TaskError(
                "this model holds several tasks, and the call does not say which",
                expected=f"task_ids among 0..{len(self.tasks) - 1} ({', '.join(self.tasks)})",
                got="none",
                where="forward",
                fix="pass task_ids=LongTensor (batch,), or call adapters.set_task(name)",
            )
        task = self._routed
        return True, per_task[task] if isinstance(task, int) else per_task[task.to(per_task.device)]

    def checkpointing(self) -> bool:
        """Whether the model checkpoints activations while training."""
        return self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())

    def _checked_ids(self, task_ids: Tensor, batch: int | None = None) -> Tensor:
        is_tensor = isinstance(task_ids, Tensor)
        fits = is_tensor and task_ids.dim() == 1 and not task_ids.is_floating_point() and len(task_ids) > 0
        if not fits or batch not in (None, len(task_ids)):
            raise TaskError(
                expected=f"integer task ids of shape ({'batch' if batch is None else batch},)",
                got=f"{task_ids.dtype} {tuple(task_ids.shape)}" if is_tensor else repr(task_ids),
                where="task_ids", fix="pass one id per example",
            )  # fmt: skip
        low, high = (int(v) for v in torch.aminmax(task_ids))
        if low < 0 or high >= len(self.tasks):
            raise TaskError(
                expected=f"task ids in 0..{len(self.tasks) - 1} ({', '.join(self.tasks)})", got=f"{low}..{high}",
                where="task_ids", fix="attach with all tasks, in the order the ids count them",
            )  # fmt: skip
        return task_ids

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
        if isinstance(task, str):
            if task not in self.tasks:
                raise TaskError(
                    expected=f"one of {', '.join(self.tasks)}", got=repr(task), where="set_task", fix="name a task"
                )
            task = self.tasks.index(task)
        self._task = None if task is None else int(self._checked_ids(torch.tensor([task]))[0])
        self._routed = self._task  # for parts of the model called by themselves, as generation calls an encoder

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model computes what the backbone alone does."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def set_penalty(
        self, penalty: Penalty, *, schedule: Schedule | None = None, total_steps: int | None = None
    ) -> None:
        """Choose what holds the adapter small; `total_steps` counts optimiser steps and is needed for a budget.

        Raises:
            BudgetError: the budget is below the smallest candidate, or the length of training is unknown.
            AttachError: the adapters are compact and have no gates.
        """
        self.pressure = Pressure(self._gates(), penalty, schedule or Schedule(), total_steps=total_steps)

    def penalty(self) -> Tensor:
        """The term to add to the task loss: a differentiable scalar, the same for each micro-batch of a step.

        Raises:
            TrainingError: no penalty was chosen.
        """
        if self.pressure is None or self.bank is None:
            raise TrainingError(
                "there is no penalty to compute", expected="set_penalty(L0(...) or Budget(...)) before training",
                got="none set", where="adapters.penalty", fix="pass penalty= to attach, or call adapters.set_penalty",
            )  # fmt: skip
        return self.pressure.term(self.bank)

    def gate_parameters(self) -> list[nn.Parameter]:
        """The gates: a learning rate of their own, no weight decay."""
        return [] if self.bank is None else [self.bank.log_alpha]

    def weight_parameters(self) -> list[nn.Parameter]:
        """What the paths learn."""
        return [p for p in self.paths.parameters() if p.requires_grad]

    def head_parameters(self) -> list[nn.Parameter]:
        """Parameters of the model's own task heads, trained and saved along."""
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
        kept = choose_units(bank, budget, scores)
        return build_structure(
            bank,
            kept,
            cast(Mapping[str, Path], self.paths),
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
        largest moves and the ratios remain as routing. A unit kept with a gate of 0 starts from a zero contribution.
        """
        bank = self._gates()
        kept = self._kept_mask(structure)
        gates = bank.deterministic()
        values = gates * kept
        top = values.amax(0)
        for key, path in self._typed_paths():
            where = bank.slices[key]
            own = kept[:, where].amax(0).expand(path.units)
            if len(self.tasks) == 1:
                path.condense(own.nonzero().flatten(), gates[0, where].expand(path.units))
            else:
                path.scale_units(top[where].expand(path.units))
        if len(self.tasks) == 1:
            bank.fix(kept)
        else:
            bank.fix(torch.where(top > 0, values / top.clamp(min=1e-30), kept))
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
        bank = self._gates()
        structure = structure or self.structure or self.discretize()
        if task is not None:
            structure = structure.for_task(task)
        kept = self._kept_mask(structure)
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
        model = self.model
        self._unhook()
        self.paths = nn.ModuleDict(survivors)
        self.bank = self.pressure = None
        self.tasks, self.structure = structure.tasks, structure
        self._task = 0 if len(self.tasks) == 1 else None
        self._hook(model)
        return structure

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

    def _kept_mask(self, structure: Structure) -> Tensor:
        """(tasks, units) 1 where kept."""
        bank = self._gates()
        kept = torch.zeros_like(bank.kept)
        for record in structure.paths:
            where = bank.slices.get(record.key)
            if where is None or cast(Path, self.paths[record.key]).units != record.of:
                raise AttachError(
                    "this structure was made from other candidates", expected="a structure of these adapters",
                    got=f"path {record.key} with {record.of} units", where="prune / compact",
                    fix="attach(model, structure) builds a structure directly",
                )  # fmt: skip
            for task, units in record.units.items():
                columns = [where.start + (unit if where.stop - where.start > 1 else 0) for unit in units]
                kept[self.tasks.index(task), columns] = 1.0
        return kept

    def _typed_paths(self) -> Iterator[tuple[str, Path]]:
        for key, path in self.paths.items():
            yield key, cast(Path, path)

    # -- in and out of the model ---------------------------------------------------------------------------------------

    def _hook(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        accepts = "task_ids" in inspect.signature(model.forward).parameters
        self._handles.append(
            model.register_forward_pre_hook(ModelHook(self, pop_task_ids=not accepts), with_kwargs=True)
        )
        self._handles.append(model.register_forward_hook(OutputAnchor(self)))
        embedding = _input_embedding(model)
        if embedding is not None:
            self._handles.append(embedding.register_forward_hook(EmbeddingHook(self)))
        inputs: dict[str, list[str]] = {}
        outputs: dict[tuple[str, bool], list[str]] = {}
        stashes: dict[str, set[str]] = {}
        for key, path in sorted(self._typed_paths(), key=lambda item: (item[1].stage, item[0])):
            site = path.site
            if site.write.side == "input":
                inputs.setdefault(site.write.module, []).append(key)
            else:
                outputs.setdefault((site.write.module, site.is_sublayer), []).append(key)
            if site.tap.module != site.write.module:
                stashes.setdefault(site.write.module, set()).add(site.tap.module)
                inputs.setdefault(site.tap.module, [])
        remembered = Counter(tap for taps in stashes.values() for tap in taps)
        for name, keys in inputs.items():
            hook = InputHook(self, keys, name if name in remembered else None)
            self._handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))
        for (name, whole), keys in sorted(outputs.items(), key=lambda item: item[0][1]):
            final = whole or (name, True) not in outputs
            last = [tap for tap in sorted(stashes.get(name, ())) if remembered[tap] == 1 and final]
            hook_out = OutputHook(self, keys, last, whole=whole)
            self._handles.append(modules[name].register_forward_hook(hook_out, with_kwargs=True))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.tapped.clear()

    def detach(self) -> nn.Module:
        """Take everything out of the model again; every bit, hook and `requires_grad` of it is as before `attach`.

        Task heads keep what they learned.
        """
        model = self.model
        self._unhook()
        delattr(model, NAME)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._required_grad)
        self._model.clear()
        return model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tapped": {}}


def get_adapters(model: nn.Module) -> Adapters:
    """The adapters attached to `model` (or to what DDP and torch.compile wrapped).

    Raises:
        AttachError: it has none.
    """
    for module in model.modules():
        found = getattr(module, NAME, None)
        if isinstance(found, Adapters):
            return found
    raise AttachError("this model has no adapters", where=type(model).__name__, fix="call gatedadapters.attach first")


def _follow_loaded_gates(adapters: Adapters, incompatible: Any) -> None:
    """After a state dict was loaded: fixed gates have a Structure, gates that still learn have none."""
    bank = adapters.bank
    if bank is not None:
        adapters.structure = adapters.discretize() if bank.frozen else None


def _input_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except NotImplementedError:
        return None
    return embedding if isinstance(embedding, nn.Module) else None
