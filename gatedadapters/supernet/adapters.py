"""What users call: train with a penalty, discretize, prune or compact, merge, save, detach."""

from __future__ import annotations

import copy
import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gatedadapters.artefact_files import is_finite
from gatedadapters.backbone.attached import apply_requires_grad
from gatedadapters.backbone.fingerprint import Fingerprint
from gatedadapters.config import Budget, Penalty, Schedule, SearchSpace
from gatedadapters.errors import ArtifactError, AttachError, MaskError, PathError, TaskError, TrainingError
from gatedadapters.gates import GateBank, Pressure
from gatedadapters.paths import Elements, Path, SkippedSite
from gatedadapters.runtime.call import forget, switched_off
from gatedadapters.runtime.sharding import is_sharded, on_first, whole
from gatedadapters.runtime.steps import CLOCK
from gatedadapters.safe_files import listed
from gatedadapters.structure import Structure
from gatedadapters.structure.discretize import build_structure, choose_units, kept_mask
from gatedadapters.structure.folder import write
from gatedadapters.structure.frontier import Frontier
from gatedadapters.structure.origin import Origin
from gatedadapters.structure.publish import OnCard, publish, published
from gatedadapters.supernet.frontier import mean_loss, measure
from gatedadapters.supernet.hooks import ModelHook, OutputAnchor, hook_embedding, point_hooks, register_hook
from gatedadapters.supernet.merging import Merged, merge
from gatedadapters.supernet.own_saving import OwnSaving
from gatedadapters.supernet.supernet import NAME, Supernet
from gatedadapters.supernet.weight_forward import weight_forwards


class ScoresOfElements(Protocol):
    """Importance of the elements of parameters, by parameter name: a mapping, or `masking.Scores`."""

    def __getitem__(self, name: str, /) -> Tensor:
        """The scores of one parameter, in its shape."""


class Adapters(Supernet):
    """All trainable state that `attach` puts into a model, registered there as `gated_adapters`.

    The other attributes are those of `Supernet`, which is what hooks call while the model runs.

    Attributes:
        origin: base, tasks and training, which `save` writes into the folder; None takes what the model tells of
            itself.
    """

    def __init__(
        self, paths: Mapping[str, Path], *, tasks: Sequence[str], space: SearchSpace, identity: Fingerprint, seed: int
    ) -> None:
        super().__init__(paths, tasks=tasks, space=space, identity=identity, seed=seed)
        self.origin: Origin | None = None
        nn.Module.register_load_state_dict_post_hook(self, _follow_loaded_gates)

    # -- training ------------------------------------------------------------------------------------------------------

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model computes what the backbone alone does, in this thread or asyncio task alone.

        Merged adapters are taken out of the weights meanwhile, which every thread sees.
        """
        if not self.enabled:
            yield
            return
        with switched_off(self):
            self._exchange_merged()
            try:
                yield
            finally:
                self._exchange_merged()

    @property
    def misfits(self) -> tuple[SkippedSite, ...]:
        """Deprecated name of `skipped_sites`."""
        warnings.warn("Adapters.misfits is now called Adapters.skipped_sites", DeprecationWarning, stacklevel=2)
        return self.skipped_sites

    def _exchange_merged(self) -> None:
        if self.merged is not None:
            self.merged.exchange(self.model)

    def set_penalty(
        self, penalty: Penalty, *, schedule: Schedule | None = None, total_steps: int | None = None
    ) -> None:
        """Choose the penalty that closes gates.

        After a prune the gates no longer learn. A smaller budget is then met at once, by a second prune.

        Args:
            penalty: `L0(weight)`, or a `Budget`.
            schedule: when the penalty ramps up and when the gates are pruned; default: `Schedule()`.
            total_steps: number of optimiser steps of the training; needed for a budget, whose target falls over it.

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
        self.pressure.asked_for = True
        return self.pressure.term(self.bank)

    def choose_elements(self, scores: ScoresOfElements) -> None:
        """Let every `elements` path stand at the elements of its map that score highest; call it before training.

        Args:
            scores: by parameter of the model, the importance of each element: what `ga.score` returns, or a dictionary.

        Raises:
            PathError: there are no such paths, no scores of a weight, or scores of another shape or not finite.
                The paths before the one that it names have their elements already.
        """
        paths = [path for _, path in self.typed_paths() if isinstance(path, Elements)]
        if not paths:
            raise PathError(
                "there are no elements to choose",
                expected="paths of the kind elements",
                got=", ".join(sorted({path.kind for _, path in self.typed_paths()})) or "no paths",
                where="choose_elements",
                fix="attach a search space with a path {kind: elements}",
            )
        for path in paths:
            name = f"{path.site.write.module}.weight"
            try:
                own = scores[name]
            except (KeyError, MaskError) as error:
                raise PathError(
                    "there are no scores of this weight",
                    expected=f"scores of {name}",
                    got="none",
                    where=f"{path.kind} at {path.site.write.module}",
                    fix="score all weights that elements are offered at",
                ) from error
            path.choose_by(own)

    def _gates(self) -> GateBank:
        if self.bank is None:
            raise AttachError(
                "these adapters are compact: their gates are folded into the weights",
                fix="attach the search space anew",
                where="adapters",
            )
        return self.bank

    # -- the discrete result -------------------------------------------------------------------------------------------

    def discretize(self, budget: Budget | None = None, *, scores: Tensor | None = None) -> Structure:
        """Turn the gates into a Structure by one fixed rule; the adapters are not changed.

        Without a budget, a unit is kept if its test-time gate is above 0. With a budget, units are kept in descending
        order of `scores` (default: the probability of being open). A unit that no longer fits is skipped.

        Args:
            budget: what the Structure may cost at most; default: the one trained under, if any.
            scores: (tasks, units), higher is kept first; e.g. random numbers for a control at equal budget.

        Raises:
            BudgetError: the budget is below the smallest candidate, or the scores hold NaN.
            AttachError: a gate is NaN.
        """
        bank = self._gates()
        if budget is None and self.pressure is not None and isinstance(self.pressure.penalty, Budget):
            budget = self.pressure.penalty
        return self._structure(choose_units(bank, budget, scores), budget)

    def frontier(
        self, batches: Iterable[Mapping[str, Any]], *, points: int = 8, loss: Callable[[nn.Module], float] | None = None
    ) -> Frontier:
        """Size against held-out loss for several budgets, each with its structure; nothing is changed.

        The structures are those of `discretize` as the gates are now, so call it during a search, or after one that
        did not prune.

        Args:
            batches: held-out batches, each `model(**batch)` with a loss; read once.
            points: number of budgets, in equal ratios from a 128th of all candidates to all of them.
            loss: the held-out loss of the model, instead of the mean of its own over `batches`.

        Raises:
            AttachError: the adapters are compact.
            BudgetError: fewer than two points, or no batches.
        """
        bank, model, read = self._gates(), self.model, list(batches)
        held_out = loss if loss is not None else (lambda model: mean_loss(model, read))
        return measure(self, bank, self.discretize, lambda: held_out(model), points=points)

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
        """Fix the gates to `structure` and let its weights train on.

        Units that are dropped are closed for good; units that are kept are open, without noise. Parameters keep their
        shapes, so the optimiser can go on; `compact` shrinks them later.

        With a single task, the gate values move into the weights. Paths that can (`Path.condense`) also fold the
        dropped units into the kept ones, so the function changes only by what the budget cut off. With several tasks,
        the largest gate of each unit moves into the weights, and each task keeps its ratio to it as routing. A unit
        that is kept with a gate of 0 starts from a zero contribution. If another task's gate is open there, it starts
        from that task's contribution instead, because a routing of 0 would get no gradient.

        Raises:
            AttachError: the structure names other candidates, or a weight or gate is not finite.
        """
        bank = self._gates()
        kept = kept_mask(structure, bank, self.typed_paths(), self.tasks)
        self._check_finite()
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

    def _check_finite(self) -> None:
        """Check that weights and gates are finite, as folding one into the other needs.

        Raises:
            AttachError: naming the first paths that hold something else.
        """
        named = [*self.paths.named_parameters(), ("the gates", self._gates().log_alpha)]
        broken = [name for name, value in named if not is_finite(value.detach())]
        if broken:
            raise AttachError(
                "adapters with values that are not finite are neither pruned nor compacted",
                expected="finite weights and gates",
                got=f"inf or nan in {len(broken)} tensors",
                where=listed(broken),
                fix="the training diverged: train again with a lower rate, or from an earlier checkpoint",
            )

    def prune_if_due(self) -> None:
        """Fix the Structure that the penalty asks for, if the schedule says so; called between two steps."""
        if self.bank is not None and self.pressure is not None and self.pressure.prune_is_due(self.bank):
            self.bank.keep_in_range()
            self.prune(self.discretize())

    @torch.no_grad()
    def compact(self, structure: Structure | None = None, *, task: str | None = None) -> Structure:
        """Keep only the paths and units of `structure`, in place, with the gates folded into the weights.

        Args:
            structure: made by `discretize` on these adapters; default: the pruned structure, else `discretize()`.
            task: keep only what this task uses.

        Returns:
            The structure that is now in place.

        Raises:
            AttachError: already compact, the structure names other candidates, or a weight or gate is not finite.
        """
        self._gates()
        model = self.model
        self.unhook()
        try:
            return self._fold(structure, task)
        finally:
            self.hook(model)

    def compacted(self) -> Adapters:
        """A copy of what `compact()` would leave, in no model, to save; these adapters train on unchanged.

        Compact adapters are their own copy.
        """
        if self.bank is None:
            return self
        twin = Adapters(
            copy.deepcopy(dict(self.typed_paths())),
            tasks=self.tasks,
            space=self.space,
            identity=self.identity,
            seed=self.seed,
        )
        twin.bank, twin.structure, twin.origin = copy.deepcopy(self.bank), self.structure, self.origin
        twin.head_names, twin._model = self.head_names, self._model
        twin._fold(self.structure or self.discretize(), None)
        return twin

    def _fold(self, structure: Structure | None, task: str | None) -> Structure:
        """Make these adapters compact while they are in no model; see `compact`."""
        bank = self._gates()
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
        self.paths = nn.ModuleDict(survivors)
        self.bank = self.pressure = None
        self.tasks, self.structure = structure.tasks, structure
        self._task = 0 if len(self.tasks) == 1 else None
        return structure

    def merge(self, task: str | None = None) -> Merged:
        """Add compact adapters to the backbone's own weights, in place.

        No path runs afterwards, so a forward costs as much as the backbone alone. `unmerge` restores the weights bit
        for bit; `disabled` does so for the length of a context. Each sum is rounded once, to the dtype of its weight.
        The original values stay in memory (`Merged.bytes`).

        Args:
            task: the task to merge, where there are several.

        Returns:
            What rounding lost, by weight. A second merge of the same task changes nothing and returns the same.

        Raises:
            AttachError: not compact, disabled, on a shelf, or another task's are merged; a weight is shared, quantised,
                on the meta device, or of a module that computes more than a linear map.
            PathError: a path computes more than a linear map.
            TaskError: there are several tasks, and none is named.
            ArtifactError: a merged value would not be finite.


        Nothing is changed by any of them.
        """
        index = self._task_to_merge(task)
        name = self.tasks[index]
        if self.merged is None:
            self.merged = merge(self.check_alone(), dict(self.typed_paths()), name, index, keep=True)
        elif self.merged.task != name:
            raise AttachError(
                "other adapters are merged",
                expected=f"task {self.merged.task!r} again, or none",
                got=repr(name),
                where="merge",
                fix="call adapters.unmerge() first",
            )
        return self.merged

    def unmerge(self) -> None:
        """Restore the weights as they were before `merge`, bit for bit. Without a merge, nothing happens.

        Raises:
            AttachError: within `disabled`.
        """
        if self.merged is not None:
            self._check_enabled()
            self.merged.exchange(self.model)
            self.merged = None

    def merge_and_detach(self, task: str | None = None) -> Merged:
        """Add compact adapters to the backbone's weights and detach them: a plain model is left for `save_pretrained`.

        Original values are not kept, so there is no way back. Otherwise as `merge`.
        """
        if self.merged is not None:
            done = self.merge(task)
            self.merged = None
        else:
            index = self._task_to_merge(task)
            done = merge(self.check_alone(), dict(self.typed_paths()), self.tasks[index], index, keep=False)
        self.detach()
        return Merged(done.task, done.drift, 0)

    def _task_to_merge(self, task: str | None) -> int:
        """The position of the task whose adapters are to be merged."""
        if self.bank is not None:
            raise AttachError(
                "only compact adapters can be merged",
                expected="gates folded into the weights",
                got=f"gates over {len(self.paths)} candidate paths",
                where="merge",
                fix="call adapters.compact() first",
            )
        self._check_enabled()
        if task is None and len(self.tasks) == 1:
            return 0
        if task not in self.tasks:
            raise TaskError(
                "one set of weights serves one task",
                expected=f"one of {', '.join(self.tasks)}",
                got=repr(task),
                where="merge(task=)",
                fix="name the task to merge, or keep the adapters attached for mixed batches",
            )
        return self.tasks.index(task)

    def _check_enabled(self) -> None:
        if not self.enabled:
            fix = "leave `with adapters.disabled()` first"
            raise AttachError("the adapters are disabled", where="merge / unmerge", fix=fix)

    def save(
        self,
        folder: str | FilePath,
        *,
        dtype: torch.dtype = torch.float32,
        overwrite: bool = False,
        beside: bool = False,
        allow_nonfinite: bool = False,
    ) -> None:
        """Write compact adapters and task heads into `folder`, which `load_adapters` reads.

        The folder holds `structure.json`, with digests of both files, `adapters.safetensors`, and a model card,
        `README.md`; a card that somebody wrote or edited stays. It appears complete or not at all. Of a sharded model,
        every process calls this; the first one writes, and all raise its error.

        Args:
            folder: a new or an empty folder.
            dtype: of what is stored, float32 or bfloat16.
            overwrite: replace an artefact that the folder holds, in one step.
            beside: other files that the folder holds stay; an earlier artefact in it is replaced.
            allow_nonfinite: also write infinities and NaN.

        Raises:
            ArtifactError: the adapters are not compact, a value is not finite, or the folder is not free.
        """
        if self.bank is not None or self.structure is None:
            raise ArtifactError(
                "only compact adapters are saved",
                expected="adapters whose gates are folded into their weights",
                got=f"gates over {len(self.paths)} candidate paths",
                where="Adapters.save",
                fix="call adapters.compact() first, or save adapters.compacted() to go on training",
            )
        heads = {name: whole(value) for name, value in zip(self.head_names, self.head_parameters(), strict=True)}
        model, structure = self._model[0] if self._model else None, self.structure
        on_first(
            model is not None and is_sharded(model),
            lambda: write(
                folder,
                structure,
                dict(self.typed_paths()),
                heads,
                dtype=dtype,
                overwrite=overwrite,
                origin=self.origin or Origin.of(model, self.tasks),
                beside=beside,
                allow_nonfinite=allow_nonfinite,
            ),
        )

    def push_to_hub(
        self,
        repository: str,
        *,
        base_model: str | None = None,
        license: str | None = None,
        card: OnCard = "write",
        private: bool | None = None,
        revision: str | None = None,
        message: str = "Upload adapters",
        dtype: torch.dtype = torch.float32,
    ) -> str:
        """Save compact adapters and task heads to a repository on the Hugging Face Hub.

        `load_adapters(model, repository)` and `ga.load(repository)` read them from there. One commit holds all files:
        what `save` writes, with a card for the hub, and a picture of the structure. Log in with `hf auth login`, or set
        `HF_TOKEN`.

        Args:
            repository: its id, `"user/name"`; it is made if it does not exist.
            base_model: id of the base on the hub, where the model was loaded from a folder.
            license: id of the licence for the card, such as `"apache-2.0"`; default: the one that an earlier card
                states, else `"unknown"`.
            card: what becomes of a card in the repository that somebody wrote or edited: `"write"` refuses to replace
                it, `"keep"` leaves it, `"replace"` replaces it. One that this library wrote is always replaced.
            private: whether a new repository is private; default: the account's setting.
            revision: a branch, which is made if it does not exist; default: the main one.
            message: of the commit.
            dtype: of what is stored, float32 or bfloat16.

        Returns:
            The address of the commit.

        Raises:
            ArtifactError: the adapters are not compact, or name their base by a folder of this machine; the repository
                holds a card that somebody wrote; or the hub cannot be reached or refuses. Nothing is committed then.
        """
        model = self._model[0] if self._model else None
        origin = self.origin
        self.origin = published(origin or Origin.of(model, self.tasks), base_model)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                folder = FilePath(scratch) / "adapter"
                self.save(folder, dtype=dtype)
                return publish(
                    folder,
                    repository,
                    license=license,
                    card=card,
                    private=private,
                    revision=revision,
                    message=message,
                )
        finally:
            self.origin = origin

    # -- in and out of the model ---------------------------------------------------------------------------------------

    def hook(self, model: nn.Module) -> None:
        """Register all hooks and forwards of the paths."""
        accepts = "task_ids" in inspect.signature(model.forward).parameters
        self._handles.append(
            model.register_forward_pre_hook(ModelHook(self, pop_task_ids=not accepts), with_kwargs=True)
        )
        self._handles.append(model.register_forward_hook(OutputAnchor(self), always_call=True))
        self._handles += hook_embedding(self, model)
        for name, hook in point_hooks(self):
            self._handles.append(register_hook(hook, model.get_submodule(name)))
        for forward in weight_forwards(self, model):
            forward.install()
            self._forwards.append(forward)
        if isinstance(model, PreTrainedModel):
            saving = OwnSaving(model, self)
            saving.install()
            self._forwards.append(saving)
        if self.bank is not None:
            CLOCK.add(self)

    def unhook(self) -> None:
        """Take all hooks and forwards out."""
        CLOCK.discard(self)
        for handle in (*self._handles, *self._forwards):
            handle.remove()
        self._handles.clear()
        self._forwards.clear()
        self._averaging = None
        forget(self.serial)

    def check_alone(self) -> nn.Module:
        """The model, which these adapters may change.

        Raises:
            AttachError: the adapters are on a shelf, so the model is not theirs alone.
        """
        model = self.model
        if self.on_shelf:
            fix = "shelf.detach(), then load_adapters(model, folder) for these alone"
            raise AttachError("these adapters are on a shelf", where="merge / detach", fix=fix)
        return model

    def detach(self) -> nn.Module:
        """Take the adapters out: every bit, hook and `requires_grad` of the model is as it was before `attach`.

        Task heads keep what they learned. A sparse delta that stays in the model keeps the backbone frozen.
        """
        model = self.check_alone()
        self.unmerge()
        self.unhook()
        delattr(model, NAME)
        apply_requires_grad(model, self._required_grad)
        self._model.clear()
        return model


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
