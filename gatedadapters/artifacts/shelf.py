"""Several saved adapters on one model: one of them at work, or each example's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from gatedadapters.artifacts.load import Base, read_saved
from gatedadapters.backbone.attached import apply_requires_grad, trained_originally
from gatedadapters.errors import ArtifactError, AttachError, PathError, TaskError
from gatedadapters.paths.base import holds_examples
from gatedadapters.structure.folder import state
from gatedadapters.supernet.adapters import NAME, Adapters
from gatedadapters.supernet.attach import build, check_free
from gatedadapters.supernet.hooks import (
    RUNNING,
    InputHook,
    ModelHook,
    OutputHook,
    batch_size,
    hook_embedding,
    new_serial,
    place,
    point_hooks,
)

Names = str | Sequence[str | None] | None


class Shelf(nn.Module):
    """Saved adapters by name, on one model, registered there as `gated_adapters`.

    Switching moves pointers alone: its cost depends neither on the backbone nor on the adapters, and adapters that are
    not at work cost memory but no time. Task heads that were saved with adapters come and go with them.

        shelf = ga.Shelf.load(model, {"mood": "out/mood", "topic": "out/topic"})  # the first is active
        shelf.activate("topic")
        model(**batch, adapter_names=["mood", "topic", None])  # each example its own; None is the backbone alone
        with shelf.using("mood"):
            model.generate(**inputs)

    Attributes:
        members: the adapters by name; each can be looked at and saved like any others.
    """

    members: nn.ModuleDict

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleDict()
        self.serial, self._enabled = new_serial(self), True
        self._names: Names = None  # one for all, or one per example
        self._seated: str | None = None  # whose heads the model wears
        self._model = [model]
        self._handles: list[Any] = []
        self._places: dict[tuple[str, type], tuple[_SharedInput | _SharedOutput, Any]] = {}
        self._required_grad = trained_originally(model)

    # -- what is on it -------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, model: nn.Module, folders: Mapping[str, str | Path], *, base: Base = "same") -> Self:
        """Put saved adapters on `model` and activate the first. Of the backbone nothing is copied.

        Args:
            model: the backbone (and heads) that all of them were made for, no adapters attached.
            folders: what `Adapters.save` wrote, by the name each shall have.
            base: see `load_adapters`.

        Raises:
            ArtifactError: no folders, a bad name, or see `load_adapters`.
            AttachError: the model already has adapters.

        The model is left untouched by all of them.
        """
        check_free(model)
        if not folders:
            raise ArtifactError(expected="folders of saved adapters by name", got="none", where="Shelf.load")
        shelf = cls(model)
        try:
            model.add_module(NAME, shelf)
            apply_requires_grad(model, shelf._required_grad)
            shelf._hook()
            for name, folder in folders.items():
                shelf.add(name, folder, base=base)
            shelf.activate(next(iter(folders)))
        except BaseException:
            shelf.detach()
            raise
        return shelf

    def add(self, name: str, folder: str | Path, *, base: Base = "same") -> Adapters:
        """Load saved adapters under a new name, without activating them.

        Raises:
            ArtifactError: the name is taken or cannot be one, or see `load_adapters`; nothing has changed then.
        """
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ArtifactError(
                expected="a name without dots that no module has itself",
                got=repr(name),
                where="Shelf.add",
                fix="choose another name",
            )
        if name in self.members:
            raise ArtifactError(
                "the name is taken",
                expected=f"other names than {', '.join(self.members)}",
                got=repr(name),
                where="Shelf.add",
                fix=f"choose another name, or call shelf.remove({name!r}) first",
            )
        model = self.model
        with self._bare():
            structure, tensors = read_saved(model, folder, base=base)
            member = build(model, structure)
            member.structure = structure
        at_weight = [key for key, path in member.typed_paths() if path.site.at_weight]
        if at_weight:
            raise ArtifactError(
                "paths at weights change them for a whole batch, and cannot take turns with others",
                expected="paths at what modules take or return",
                got=at_weight[0],
                where=f"Shelf.add({name!r})",
                fix="load_adapters(model, folder) for these alone, or search without weight_lora",
            )
        for head in member.head_names:
            worn = model.get_parameter(head).requires_grad_()
            member.aside.append(nn.Parameter(torch.empty_like(worn), requires_grad=False))
        with torch.no_grad():
            for key, value in state(member).items():
                value.copy_(tensors[key])
        self.members[name] = member
        for module, hook in point_hooks(member):
            shared = _SharedInput if isinstance(hook, InputHook) else _SharedOutput
            if (module, shared) not in self._places:
                new = shared(self)
                self._places[module, shared] = new, place(new, model.get_submodule(module))
            self._places[module, shared][0].hooks.setdefault(name, []).append(hook)
        return member

    def remove(self, name: str) -> None:
        """Take adapters off the shelf; if they are active, the backbone alone is left at work.

        Raises:
            ArtifactError: unknown name.
        """
        self._known(name, "Shelf.remove")
        if self._names == name or not isinstance(self._names, str | None):
            self.activate(None)
        del self.members[name]
        for key, (shared, handle) in list(self._places.items()):
            shared.hooks.pop(name, None)
            if not shared.hooks:
                handle.remove()
                del self._places[key]

    def detach(self) -> nn.Module:
        """Take everything out of the model again; every bit, hook and `requires_grad` of it is as before `load`.
        A sparse delta that stays in it keeps the backbone frozen.
        """
        model = self.model
        self.activate(None)
        for handle in (*self._handles, *(handle for _, handle in self._places.values())):
            handle.remove()
        self._handles.clear()
        self._places.clear()
        delattr(model, NAME)
        apply_requires_grad(model, self._required_grad)
        self._model.clear()
        return model

    # -- who is at work ------------------------------------------------------------------------------------------------

    @property
    def head_names(self) -> tuple[str, ...]:
        """Task heads of the model that some of the adapters bring values for."""
        return tuple(dict.fromkeys(head for member in self._typed_members().values() for head in member.head_names))

    @property
    def active(self) -> str | None:
        """Whose adapters work in a call that names none; None for the backbone alone, or within `using` a mixture."""
        return self._names if isinstance(self._names, str) else None

    @property
    def current(self) -> Adapters | None:
        """The active adapters."""
        return None if self.active is None else self._typed_members()[self.active]

    def activate(self, name: str | None) -> None:
        """From now on these adapters work in every call that names none; None leaves the backbone alone.

        Raises:
            ArtifactError: unknown name.
        """
        self._use(name, "Shelf.activate")

    @contextmanager
    def using(self, names: Names) -> Iterator[None]:
        """Within this context these adapters work: one name for all examples, or one per example (None: the backbone).

        For what passes no arguments on to the model, such as `generate`: with beams or several returned sequences,
        each example's name counts for all of its own.

        Raises:
            ArtifactError: unknown name.
            TaskError: a mixture with task heads.
        """
        before = self._names
        self._use(names, "Shelf.using")
        try:
            yield
        finally:
            self._use(before if self._all_known(before) else None, "Shelf.using")

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model computes what the backbone and its own heads alone do."""
        before, self._enabled = self._enabled, False
        self._seat()
        self._announce(self._groups(self._names))
        try:
            yield
        finally:
            self._enabled = before
            self._seat()
            self._announce(self._groups(self._names))

    def begin_forward(self, task_ids: Tensor | None, batch: int | None, names: Names) -> None:
        """Called before each forward of the model."""
        given, names = names is not None, self._names if names is None else names
        each = names is not None and not isinstance(names, str)
        if each and not _fit(cast(Sequence[Any], names), batch, exactly=given):
            raise TaskError(
                "adapter names do not match the batch",
                expected=f"{batch or 'as many'} names, one per example",
                got=repr(names),
                where="adapter_names",
                fix="name each example's adapters, None for the backbone",
            )
        groups = self._groups(names, batch=batch)
        if given and self._enabled and groups != ((self._seated, None),):
            self._check_headless([*(name for name, _ in groups), *([self._seated] if self._seated else [])])
        for name, rows in groups:
            own = task_ids if task_ids is None or rows is None else task_ids[list(rows.picked)]
            self._typed_members()[name].begin_forward(own, None if rows else batch)
        self._announce(groups)

    def end_forward(self) -> None:
        """Called after each forward of the model: parts of it that are called by themselves go by what is active."""
        if not torch.is_grad_enabled():
            for member in self._typed_members().values():
                member.end_forward()
            self._announce(self._groups(self._names))

    def checkpointing(self) -> bool:
        """Whether the model checkpoints activations while training."""
        return self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())

    @property
    def model(self) -> nn.Module:
        """The model this shelf is attached to."""
        if not self._model:
            raise AttachError("this shelf is detached", fix="load the folders again")
        return self._model[0]

    def _use(self, names: Names, where: str) -> None:
        groups = self._groups(names, where)
        if names is not None and not isinstance(names, str):
            self._check_headless([name for name, _ in groups])
        self._names = names
        self._seat()
        self._announce(groups)

    def _groups(
        self, names: Names, where: str = "adapter_names", batch: int | None = None
    ) -> tuple[tuple[str, Rows | None], ...]:
        """Who works on which examples; None for all."""
        distinct = dict.fromkeys([names] if names is None or isinstance(names, str) else names)
        for name in distinct:
            if name is not None:
                self._known(name, where)
        if names is None or isinstance(names, str) or len(distinct) == 1:
            return tuple((name, None) for name in distinct if name is not None)
        return tuple(
            (name, Rows(len(names), tuple(i for i, other in enumerate(names) if other == name), batch))
            for name in distinct
            if name is not None
        )

    def _announce(self, groups: tuple[tuple[str, Rows | None], ...]) -> None:
        RUNNING[self.serial] = groups if self._enabled else ()

    def _seat(self) -> None:
        """Let the model wear the heads of the active adapters: values change places with the model's own."""
        wanted = self.active if self._enabled else None
        for name in (self._seated, wanted):
            if name is not None and self._seated != wanted:
                member = self._typed_members()[name]
                for head, other in zip(member.head_names, member.aside, strict=True):
                    parameter = self.model.get_parameter(head)
                    parameter.data, other.data = other.data, parameter.data
                member._model[:] = [self.model] if name == wanted else []
        self._seated = wanted

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """Within this context the model wears its own heads."""
        before, self._enabled = self._enabled, False
        self._seat()
        try:
            yield
        finally:
            self._enabled = before
            self._seat()

    def _check_headless(self, names: Sequence[str]) -> None:
        headed = [name for name in dict.fromkeys(names) if self._typed_members()[name].head_names]
        if headed:
            raise TaskError(
                "the model wears one set of task heads at a time",
                expected="adapters without task heads in a mixture",
                got=f"{', '.join(headed)} with heads of their own",
                where="adapter_names",
                fix="give each its own batch with shelf.using(name); attach(heads=()) trains and saves none",
            )

    def _all_known(self, names: Names) -> bool:
        return {None, *self.members}.issuperset([names] if names is None or isinstance(names, str) else names)

    def _known(self, name: str, where: str) -> None:
        if name not in self.members:
            raise ArtifactError(
                "no such adapters on the shelf",
                expected=f"one of {', '.join(self.members) or 'none'}",
                got=repr(name),
                where=where,
                fix="call shelf.add(name, folder) first",
            )

    def _typed_members(self) -> Mapping[str, Adapters]:
        return cast(Mapping[str, Adapters], self.members)

    def _hook(self) -> None:
        model = self.model
        pop = "task_ids" not in inspect.signature(model.forward).parameters
        hook = _ShelfHook(cast(Any, self), pop_task_ids=pop)
        self._handles.append(model.register_forward_pre_hook(hook, with_kwargs=True))
        self._handles.append(model.register_forward_hook(_ShelfDone(self)))
        self._handles += hook_embedding(self, model)

    def __setstate__(self, kept: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, kept)
        self.serial = new_serial(self)
        self._announce(self._groups(self._names))


def _fit(names: Sequence[Any], batch: int | None, *, exactly: bool) -> bool:
    """Whether there is a name for each example; unless `exactly`, each may stand for a run of them (beams)."""
    return len(names) > 0 and (batch is None or batch == len(names) or (not exactly and batch % len(names) == 0))


class Rows:
    """Some of a batch's examples, where tensors hold an equal run of rows for each."""

    def __init__(self, examples: int, picked: tuple[int, ...], batch: int | None) -> None:
        self.examples, self.picked, self.batch = examples, picked, batch
        together = picked == tuple(range(picked[0], picked[0] + len(picked)))
        self.index: slice | list[int] = slice(picked[0], picked[-1] + 1) if together else list(picked)
        self._on: dict[torch.device, Tensor] = {}

    def view(self, tensor: Tensor) -> Tensor:
        """(examples, rows of each, width)."""
        turned = tensor.dim() == 3 and tensor.shape[1] == self.batch != tensor.shape[0]  # positions first
        if turned or not holds_examples(tensor, self.examples):
            raise PathError(
                "adapter names do not match the batch",
                expected=f"a multiple of {self.examples} rows (one run each), examples first",
                got=f"shape {tuple(tensor.shape)}",
                where="adapter_names",
                fix="packed batches, models with positions first, and points that carry no examples (relative "
                "positions) need one name for all",
            )
        return tensor.reshape(self.examples, -1, tensor.shape[-1])

    def on(self, device: torch.device) -> slice | Tensor:
        """What indexes the examples of a tensor there; neighbours are a slice, which copies nothing."""
        if isinstance(self.index, slice):
            return self.index
        if device not in self._on:
            self._on[device] = torch.tensor(self.index, device=device)
        return self._on[device]

    def take(self, tensor: Tensor) -> Tensor:
        """These examples, (picked, rows of each, width)."""
        return self.view(tensor)[self.on(tensor.device)]


class _ShelfHook(ModelHook):
    """Before the model runs: take `adapter_names` and `task_ids` from the call."""

    adapters: Any

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook with kwargs."""
        names = kwargs.get("adapter_names")
        self.adapters.begin_forward(kwargs.get("task_ids"), batch_size(args, kwargs), names)
        taken = {"adapter_names", "task_ids"} if self.pop_task_ids else {"adapter_names"}
        return args, {name: value for name, value in kwargs.items() if name not in taken}


class _ShelfDone:
    """After the model ran."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model."""
        self.shelf.end_forward()


class _SharedInput(InputHook):
    """At one module: the input hooks of those of its adapters that work, each on its own examples."""

    adapters: Any

    def __init__(self, shelf: Shelf) -> None:
        super().__init__(cast(Any, shelf), [], None)
        self.hooks: dict[str, list[Any]] = {}

    def change(self, hidden: Tensor) -> Tensor:
        """See `InputHook`."""
        result = hidden
        for name, rows in RUNNING[self.adapters.serial]:
            own = self.hooks.get(name, ())
            part = before = result if rows is None or not own else rows.take(hidden)
            for hook in own:
                part = hook.change(part)
            if part is not before:
                result = part if rows is None else _put(hidden, result, rows, part)
        return result


class _SharedOutput(OutputHook):
    """At one module: the output hooks of those of its adapters that work, each on its own examples."""

    adapters: Any

    def __init__(self, shelf: Shelf) -> None:
        super().__init__(cast(Any, shelf), [], [])
        self.hooks: dict[str, list[Any]] = {}

    def change(self, hidden: Tensor, target: Tensor) -> Tensor:
        """See `OutputHook`."""
        result = target
        for name, rows in RUNNING[self.adapters.serial]:
            own = self.hooks.get(name, ())
            part = before = result if rows is None or not own else rows.take(target)
            read = hidden if rows is None or not own else rows.take(hidden)
            for hook in own:
                part = hook.change(read, part)
            if part is not before:
                result = part if rows is None else _put(target, result, rows, part)
        return result


def _put(old: Tensor, result: Tensor, rows: Rows, changed: Tensor) -> Tensor:
    """`result` with the rows of one member changed; copied from `old` by the first that changes something."""
    if result is old:
        result = old.clone(memory_format=torch.contiguous_format)
    rows.view(result)[rows.on(result.device)] = changed
    return result
