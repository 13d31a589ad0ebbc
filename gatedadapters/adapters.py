"""The supernet's life: attach, train with a penalty, discretize, prune or compact, detach."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from gatedadapters.backbone import Layout, discover
from gatedadapters.config import Budget, PathOptions, Penalty, Schedule, SearchSpace
from gatedadapters.errors import AttachError, PathError, TaskError, TrainingError
from gatedadapters.fingerprint import fingerprint
from gatedadapters.gates import GateBank, Group, Pressure
from gatedadapters.hooks import EmbeddingHook, InputHook, ModelHook, OutputHook
from gatedadapters.paths import Misfit, Path, Site, path_class
from gatedadapters.selection import build_structure, choose_units
from gatedadapters.structure import Fingerprint, KeptPath, Structure

logger = logging.getLogger(__name__)

NAME = "gated_adapters"
DEFAULT_TASK = "default"


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
        self._task: int | Tensor | None = 0 if len(self.tasks) == 1 else None
        self._model: list[nn.Module] = []  # a list, so that the backbone is not registered as a child of its own child
        self._handles: list[Any] = []
        self._required_grad: frozenset[str] = frozenset()

    # -- what the hooks call -------------------------------------------------------------------------------------------

    def begin_forward(self, task_ids: Tensor | None) -> None:
        """Called before each forward of the model: checks task ids and begins a new step if the gates have moved."""
        self.tapped.clear()
        if task_ids is not None:
            self._task = self._checked_ids(task_ids)
        bank = self.bank
        if bank is not None and self.training and torch.is_grad_enabled() and bank.step_is_new():
            bank.draw()
            if self.pressure is not None:
                if self.pressure.prune_is_due(bank):
                    budget = self.pressure.penalty if isinstance(self.pressure.penalty, Budget) else None
                    self.prune(self.discretize(budget))
                else:
                    self.pressure.ascend(bank)

    def gate(self, key: str) -> tuple[bool, Tensor | None]:
        """(whether path `key` is open, its gate for the present batch: None, (g,) or (batch, g))."""
        per_task = self.bank.take(key) if self.bank is not None else cast(Path, self.paths[key]).routing
        if per_task is None:
            return self.bank is None, None
        if len(self.tasks) == 1:
            return True, per_task[0]
        if self._task is None:
            raise TaskError(
                "this model holds several tasks, and the call does not say which",
                expected=f"task_ids among 0..{len(self.tasks) - 1} ({', '.join(self.tasks)})",
                got="none",
                where="forward",
                fix="pass task_ids=LongTensor (batch,), or call adapters.set_task(name)",
            )
        task = self._task
        return True, per_task[task] if isinstance(task, int) else per_task[task.to(per_task.device)]

    def checkpointing(self) -> bool:
        """Whether the model checkpoints activations while training."""
        return self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())

    def _checked_ids(self, task_ids: Tensor) -> Tensor:
        if task_ids.dim() != 1 or task_ids.is_floating_point():
            raise TaskError(
                expected="integer task ids of shape (batch,)", got=f"{task_ids.dtype} {tuple(task_ids.shape)}",
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
        """Use one task for every example until the next call that carries `task_ids`.

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
                "these adapters are compact: their gates are folded into the weights", fix="attach the search space anew"
            )
        return self.bank

    # -- the discrete result -------------------------------------------------------------------------------------------

    def discretize(self, budget: Budget | None = None, *, scores: Tensor | None = None) -> Structure:
        """The hard rule that turns gates into a Structure; nothing is changed.

        Without a budget: a unit stays where its test-time gate is above 0. With one: units are taken in order of
        `scores` (default: the probability of being open), skipping what no longer fits, until nothing does.

        Args:
            budget: what the Structure may cost at most.
            scores: (tasks, units), higher is kept first; e.g. random numbers for a control at equal budget.

        Raises:
            BudgetError: the budget is below the smallest candidate.
        """
        bank = self._gates()
        kept = choose_units(bank, budget, scores)
        return build_structure(
            bank, kept, cast(Mapping[str, Path], self.paths), tasks=self.tasks, space=self.space, budget=budget,
            identity=self.identity, seed=self.seed,
        )  # fmt: skip

    @torch.no_grad()
    def prune(self, structure: Structure) -> None:
        """Fix the gates to `structure` and go on training its weights: what is dropped is closed for good, what stays is
        open without noise. Parameters keep their shapes, so the optimiser goes on; `compact` later shrinks them.

        A single task's gate values move into the weights (the function stays what it was); of several tasks' gates the
        largest moves and the ratios remain as routing. A unit kept with a gate of 0 starts from a zero contribution.
        """
        bank = self._gates()
        kept = self._kept_mask(structure)
        values = bank.deterministic() * kept
        top = values.amax(0)
        for key, path in self._typed_paths():
            path.scale_units(top[bank.slices[key]].expand(path.units))
        bank.fix(torch.where(top > 0, values / top.clamp(min=1e-30), kept))
        self.structure = structure

    @torch.no_grad()
    def compact(self, structure: Structure | None = None, *, task: str | None = None) -> Structure:
        """Shrink to `structure` (default: the pruned one, else `discretize()`), in place: only what stays, gates folded.

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
            structure = for_task(structure, task)
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
        embedding = _input_embedding(model)
        if embedding is not None:
            self._handles.append(embedding.register_forward_hook(EmbeddingHook(self)))
        inputs: dict[str, list[str]] = {}
        outputs: dict[str, list[str]] = {}
        stashes: dict[str, set[str]] = {}
        for key, path in sorted(self._typed_paths(), key=lambda item: (item[1].stage, item[0])):
            site = path.site
            (inputs if site.write.side == "input" else outputs).setdefault(site.write.module, []).append(key)
            if site.tap.module != site.write.module:
                stashes.setdefault(site.write.module, set()).add(site.tap.module)
                inputs.setdefault(site.tap.module, [])
        remembered = {tap for taps in stashes.values() for tap in taps}
        for name, keys in inputs.items():
            hook = InputHook(self, keys, name if name in remembered else None)
            self._handles.append(modules[name].register_forward_pre_hook(hook, with_kwargs=True))
        for name, keys in outputs.items():
            hook_out = OutputHook(self, keys, sorted(stashes.get(name, ())))
            self._handles.append(modules[name].register_forward_hook(hook_out, with_kwargs=True))

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.tapped.clear()

    def detach_from_model(self) -> nn.Module:
        """Take everything out of the model again; every bit, hook and `requires_grad` of it is as before `attach`
        (task heads keep what they learned)."""
        model = self.model
        self._unhook()
        delattr(model, NAME)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self._required_grad)
        self._model.clear()
        return model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tapped": {}}


def attach(
    model: nn.Module,
    space: SearchSpace | Structure | str,
    sample: Mapping[str, Tensor] | None = None,
    *,
    tasks: Sequence[str] = (DEFAULT_TASK,),
    penalty: Penalty | None = None,
    schedule: Schedule | None = None,
    total_steps: int | None = None,
    heads: Sequence[str] | None = None,
    seed: int = 0,
) -> Adapters:
    """Freeze `model` and put gated candidates into it, in place; or build a known `Structure` without gates.

    Args:
        model: any transformers model, or a module that contains one.
        space: a search space, the name of a preset, or a Structure to train from scratch.
        sample: a batch that runs through the model, used to discover its layout; a default is made for token models.
        tasks: names of the tasks; each has its own gates over the shared paths.
        penalty, schedule, total_steps: see `Adapters.set_penalty`.
        heads: parameters of the model (names or prefixes) to train and save along; by default everything outside the
            backbone of a model without a language-model head, such as a classifier.
        seed: of path weights, gates and gate noise; equal seeds give equal adapters on every machine and rank.

    Raises:
        AttachError: the model already has adapters.
        LayoutError: no repeated blocks, or the sample batch does not run.
        PathError: the space selects nothing, or a path does not fit its point.
        ConfigError: unknown preset.
        BudgetError: see `set_penalty`.
        The model is left untouched by all of them.
    """
    if hasattr(model, NAME):
        raise AttachError(
            "this model already has adapters", expected="a model without adapters", got=f"model.{NAME}",
            where=type(model).__name__, fix="ga.detach(model) first",
        )  # fmt: skip
    space = SearchSpace.load(space) if isinstance(space, str) else space
    head_names = _head_parameters(model, heads)
    identity = fingerprint(model, skip=frozenset(head_names))
    if isinstance(space, Structure):
        built = _from_structure(model, space, identity, seed)
    else:
        built = _from_space(space, discover(model, sample), tasks, identity, head_names, seed)
        if penalty is not None:
            built.set_penalty(penalty, schedule=schedule, total_steps=total_steps)
    built.head_names = head_names
    built._required_grad = frozenset(n for n, p in model.named_parameters() if p.requires_grad)
    built.train(model.training)
    _place(built, model)
    try:
        built._model.append(model)
        built._hook(model)
        model.add_module(NAME, built)
        for name, parameter in model.named_parameters():
            if not name.startswith(f"{NAME}."):
                parameter.requires_grad_(name in head_names)
    except BaseException:
        built._unhook()
        if hasattr(model, NAME):
            delattr(model, NAME)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in built._required_grad)
        raise
    return built


def detach(model: nn.Module) -> Adapters:
    """Take the adapters out of `model`, which is then bit for bit what it was; returns them.

    Raises:
        AttachError: the model has none.
    """
    adapters = get_adapters(model)
    adapters.detach_from_model()
    return adapters


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


def for_task(structure: Structure, task: str) -> Structure:
    """The part of a structure that one task uses, as a structure of that task alone.

    Raises:
        TaskError: unknown task.
    """
    if task not in structure.tasks:
        raise TaskError(expected=f"one of {', '.join(structure.tasks)}", got=repr(task), where="for_task")
    paths = []
    for record in structure.paths:
        units = record.units.get(task, ())
        if units:
            each = record.params // len(record.kept) - (len(structure.tasks) if len(structure.tasks) > 1 else 0)
            paths.append(
                record.model_copy(
                    update={
                        "units": {task: units}, "params": each * len(units),
                        "flops": record.flops / len(record.kept) * len(units),
                        "options": record.options.resized(len(units)),
                        "open_probability": {t: p for t, p in record.open_probability.items() if t == task},
                    }
                )
            )  # fmt: skip
    return structure.model_copy(update={"tasks": (task,), "paths": tuple(paths)})


def candidates(space: SearchSpace, layout: Layout) -> tuple[dict[str, tuple[PathOptions, Site]], tuple[Misfit, ...]]:
    """Every candidate a space offers on a layout, by key, and the places where one does not fit.

    Raises:
        PathError: the space selects nothing.
    """
    found: dict[str, tuple[PathOptions, Site]] = {}
    misfits: list[Misfit] = []
    for options in space.paths:
        for site in path_class(options).sites(options, layout):
            if isinstance(site, Misfit):
                misfits.append(site)
                continue
            stem = f"{site.tap.module.replace('.', '/')}:{options.kind}"
            number = sum(key == stem or key.startswith(f"{stem}#") for key in found)
            found[f"{stem}#{number + 1}" if number else stem] = (options, site)
    if not found:
        offered = ", ".join(sorted({f"{s.kind}.{m.role}" for _, s, m in layout.maps()}))
        raise PathError(
            "the search space selects no point of this model", expected="at least one candidate",
            got="; ".join(f"{m.module}: {m.reason}" for m in misfits[:3]) or "no match",
            where=f"search space {space.name!r} on {layout.model_class}", fix=f"the model offers {offered}",
        )  # fmt: skip
    return found, tuple(misfits)


def groups(found: Mapping[str, tuple[PathOptions, Site]], n_tasks: int) -> list[Group]:
    """The candidates as the gate bank counts them: with several tasks, each unit also stores one routing value a task."""
    routing = n_tasks if n_tasks > 1 else 0
    result = []
    for key, (options, site) in found.items():
        units, params, flops = path_class(options).cost(site, options)
        result.append(Group(key, site.block, str(site.tap), units, params + routing, flops))
    return result


def _from_space(
    space: SearchSpace,
    layout: Layout,
    tasks: Sequence[str],
    identity: Fingerprint,
    head_names: Sequence[str],
    seed: int,
) -> Adapters:
    if not tasks or len(set(tasks)) != len(tasks):
        raise TaskError(expected="one or more distinct task names", got=repr(tuple(tasks)), where="attach(tasks=)")
    found, misfits = candidates(space, layout)
    generator = torch.Generator().manual_seed(seed)
    paths = {key: path_class(options)(site, options, generator) for key, (options, site) in found.items()}  # type: ignore[call-arg]
    adapters = Adapters(paths, tasks=tasks, space=space, identity=identity, seed=seed)
    adapters.bank = GateBank(groups(found, len(tasks)), space.gates, tasks=len(tasks), seed=seed)
    adapters.layout, adapters.misfits = layout, misfits
    for text in [f"{m.kind} does not fit {m.module}: {m.reason}" for m in misfits]:
        logger.warning(text)
    for unknown in (u for u in layout.unknown if u.name not in head_names):
        logger.warning("not understood, left alone: %s (%s)", unknown.name, unknown.reason)
    return adapters


def _from_structure(model: nn.Module, structure: Structure, identity: Fingerprint, seed: int) -> Adapters:
    modules = dict(model.named_modules())
    generator = torch.Generator().manual_seed(seed)
    paths: dict[str, Path] = {}
    for record in structure.paths:
        site = Site.from_dict(record.site.model_dump())
        missing = [point.module for point in (site.tap, site.write) if point.module not in modules]
        if missing:
            raise PathError(
                "this structure does not fit the model", expected=f"a module {missing[0]}", got="none of that name",
                where=f"path {record.key} on {type(model).__name__}", fix="attach it to the backbone it was made for",
            )  # fmt: skip
        path = path_class(record.options)(site, record.options, generator)  # type: ignore[call-arg]
        if len(structure.tasks) > 1:
            path.routing = torch.tensor([[float(u in record.units.get(t, ())) for u in record.kept] for t in structure.tasks])
        paths[record.key] = path
    adapters = Adapters(paths, tasks=structure.tasks, space=structure.space, identity=identity, seed=seed)
    adapters.structure = structure.model_copy(update={"fingerprint": identity})
    return adapters


def _place(adapters: Adapters, model: nn.Module) -> None:
    """Each path beside the module it writes to, gates beside the first of them."""
    modules = dict(model.named_modules())
    device = None
    for _, path in adapters._typed_paths():
        home = next((p.device for p in modules[path.site.write.module].parameters()), None)
        if home is not None and home.type != "meta":
            path.to(home)
            device = device or home
    if device is not None:
        for part in (adapters.bank, adapters.pressure):
            if part is not None:
                part.to(device)


def _head_parameters(model: nn.Module, heads: Sequence[str] | None) -> tuple[str, ...]:
    names = [name for name, _ in model.named_parameters()]
    if heads is not None:
        missing = [h for h in heads if not any(n == h or n.startswith(f"{h}.") for n in names)]
        if missing:
            raise AttachError(
                expected="names or prefixes of the model's parameters", got=", ".join(missing), where="attach(heads=)",
                fix=f"the model's top-level parts are {', '.join(n for n, _ in model.named_children())}",
            )  # fmt: skip
        return tuple(n for n in names if any(n == h or n.startswith(f"{h}.") for h in heads))
    prefix = getattr(model, "base_model_prefix", "")
    generates = callable(getattr(model, "get_output_embeddings", None)) and model.get_output_embeddings() is not None
    if not prefix or not hasattr(model, prefix) or generates:
        return ()
    return tuple(name for name in names if not name.startswith(f"{prefix}."))


def _input_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except NotImplementedError:
        return None
    return embedding if isinstance(embedding, nn.Module) else None
