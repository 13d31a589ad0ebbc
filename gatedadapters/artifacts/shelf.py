"""Several saved adapters on one model: one of them at work, or each example's own."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from gatedadapters.backbone.attached import apply_requires_grad, trained_originally
from gatedadapters.errors import ArtifactError, AttachError, PathError, TaskError
from gatedadapters.paths.base import holds_examples
from gatedadapters.runtime.call import Call, begin, current, end, forget, is_switched_off, new_serial, switched_off
from gatedadapters.runtime.forward import OwnForward
from gatedadapters.structure.folder import Base, read
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import adapters_of, check_no_adapters, move_beside
from gatedadapters.supernet.hooks import (
    Arguments,
    InputHook,
    ModelHook,
    OutputHook,
    batch_size,
    hook_embedding,
    point_hooks,
    register_hook,
)
from gatedadapters.supernet.supernet import NAME

Names = str | Sequence[str | None] | None
"""Whose adapters work: one name for all examples, or one per example; None is the backbone alone."""

_USED: ContextVar[Mapping[int, Names]] = ContextVar("adapters in use", default=MappingProxyType({}))
"""By a shelf's serial: what `Shelf.using` says in this thread or asyncio task."""


class ShelfCall(Call):
    """One forward call, as the shelf sees it.

    Attributes:
        members: (name, rows, call) of each set of adapters at work: None for all rows, and what it sees of the call.
        headed: whose task heads the model runs with; None for its own.
    """

    __slots__ = ("headed", "members")

    def __init__(self, members: tuple[tuple[str, Rows | None, Call], ...], headed: str | None) -> None:
        super().__init__(runs=bool(members))
        self.members, self.headed = members, headed

    def same_as(self, other: Call) -> bool:
        """Whether another call has the same settings."""
        return (
            isinstance(other, ShelfCall)
            and self.headed == other.headed
            and len(self.members) == len(other.members)
            and all(
                one[:2] == two[:2] and one[2].same_as(two[2])
                for one, two in zip(self.members, other.members, strict=True)
            )
        )


class Shelf(nn.Module):
    """Saved adapters by name, on one model, registered there as `gated_adapters`.

    Switching moves pointers alone: its cost depends neither on the backbone nor on the adapters, and adapters that are
    not at work cost memory but no time. Task heads that were saved with adapters work where those do; the model's own
    heads are never written to. Which adapters a call uses is decided when it begins and holds throughout it, so threads
    may call, activate and use as they like.

        shelf = ga.Shelf.load(model, {"mood": "out/mood", "topic": "out/topic"})  # the first is active
        shelf.activate("topic")
        model(**batch, adapter_names=["mood", "topic", None])  # each example its own; None is the backbone alone
        model.generate(**inputs, adapter_names=["mood", "topic", None])
        with shelf.using("mood"):  # in this thread or asyncio task alone
            pipeline(texts)

    Attributes:
        members: the adapters by name; each can be looked at and saved like any others.
    """

    members: nn.ModuleDict

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.members = nn.ModuleDict()
        self.serial = new_serial(self)
        self._active: str | None = None
        self._model = [model]
        self._handles: list[Any] = []
        self._hooks: dict[tuple[str, type], tuple[_SharedInput | _SharedOutput, Any]] = {}
        self._heads: dict[str, _HeadForward] = {}
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
        check_no_adapters(model)
        if not folders:
            raise ArtifactError(
                "a shelf needs adapters",
                expected="folders of saved adapters by name",
                got="none",
                where="Shelf.load",
                fix='name at least one: {"mood": "out/mood"}',
            )
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
                "adapters cannot have this name",
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
        saved = read(model, folder, base=base)
        at_weight = [key for key, path in saved.paths.items() if path.site.at_weight]
        if at_weight:
            raise ArtifactError(
                "paths at weights change them for a whole batch, and cannot take turns with others",
                expected="paths at what modules take or return",
                got=at_weight[0],
                where=f"Shelf.add({name!r})",
                fix="load_adapters(model, folder) for these alone, or search without weight_lora",
            )
        member = adapters_of(model, saved.structure, saved.paths)
        member.head_names, member.on_shelf = saved.structure.fingerprint.heads, True
        for head in member.head_names:
            own = model.get_parameter(head)
            member.heads.append(nn.Parameter(saved.heads[head].to(own.device, own.dtype)))
        member._model.append(model)
        member.train(model.training)
        move_beside(member, model)
        for head in member.head_names:
            own = model.get_parameter(head)
            own.requires_grad_(True)
            self._own_head(own)
        for module, hook in point_hooks(member):
            shared = _SharedInput if isinstance(hook, InputHook) else _SharedOutput
            if (module, shared) not in self._hooks:
                new = shared(self)
                self._hooks[module, shared] = new, register_hook(new, model.get_submodule(module))
            self._hooks[module, shared][0].hooks[name] = (*self._hooks[module, shared][0].hooks.get(name, ()), hook)
        self.members[name] = member
        return member

    def _own_head(self, parameter: nn.Parameter) -> None:
        """Let each module that uses this head run with the values that a call's adapters bring."""
        for name, module in self.model.named_modules():
            uses = any(own is parameter for own in module._parameters.values())
            if uses and name not in self._heads:
                self._heads[name] = _HeadForward(self, module, name)
                self._heads[name].install()

    def remove(self, name: str) -> None:
        """Take adapters off the shelf; if they are active, the backbone alone is left at work.

        Raises:
            ArtifactError: unknown name.
        """
        self._known(name, "Shelf.remove")
        if self._active == name:
            self._active = None
        del self.members[name]
        for key, (shared, handle) in list(self._hooks.items()):
            shared.hooks.pop(name, None)
            if not shared.hooks:
                handle.remove()
                del self._hooks[key]

    def detach(self) -> nn.Module:
        """Take everything out of the model again; every bit, hook and `requires_grad` of it is as before `load`.
        A sparse delta that stays in it keeps the backbone frozen.
        """
        model = self.model
        for handle in (*self._handles, *(handle for _, handle in self._hooks.values()), *self._heads.values()):
            handle.remove()
        for taken_out in (self._handles, self._hooks, self._heads):
            taken_out.clear()
        delattr(model, NAME)
        apply_requires_grad(model, self._required_grad)
        for member in self._typed_members().values():
            member._model.clear()
        self._model.clear()
        forget(self.serial)
        return model

    # -- who is at work ------------------------------------------------------------------------------------------------

    @property
    def head_names(self) -> tuple[str, ...]:
        """Task heads of the model that some of the adapters bring values for."""
        return tuple(dict.fromkeys(head for member in self._typed_members().values() for head in member.head_names))

    @property
    def active(self) -> str | None:
        """Whose adapters work in a call that names none; None for the backbone alone, or within `using` a mixture."""
        names = self._names()
        return names if isinstance(names, str) else None

    @property
    def current(self) -> Adapters | None:
        """The active adapters."""
        return None if self.active is None else self._typed_members()[self.active]

    def activate(self, name: str | None) -> None:
        """From now on these adapters work in every call that names none, in all threads; None leaves the backbone
        alone.

        Calls that are under way go on with the adapters they began with.

        Raises:
            ArtifactError: unknown name.
            AttachError: the shelf is detached.
        """
        self._groups(name, "Shelf.activate")
        _ = self.model
        self._active = name

    @contextmanager
    def using(self, names: Names) -> Iterator[None]:
        """Within this context, in this thread or asyncio task alone, these adapters work.

        For what passes no arguments on to the model, such as a pipeline: with beams or several returned sequences, each
        example's name counts for all of its own.

        Args:
            names: one for all examples, or one per example (None: the backbone).

        Raises:
            ArtifactError: unknown name.
            TaskError: a mixture with task heads.
        """
        self._check_headless(self._groups(names, "Shelf.using"))
        token = _USED.set({**_USED.get(), self.serial: names})
        try:
            yield
        finally:
            _USED.reset(token)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context, in this thread or asyncio task alone, the model computes what the backbone and its own
        heads do.
        """
        with switched_off(self):
            yield

    def begin_forward(self, task_ids: Tensor | None, batch: int | None, names: Names) -> None:
        """Called before each forward of the model.

        Args:
            task_ids: (batch,), as they were given.
            batch: number of examples, as far as the call's arguments tell.
            names: `adapter_names` as they were given.

        Raises:
            ArtifactError: unknown name.
            TaskError: the names do not match the batch, or mix adapters with task heads.
        """
        given = names is not None
        names = names if given else self._names()
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
        self._check_headless(groups)
        begin(self, self._call(groups, task_ids, batch))
        for name, _ in groups:
            self._typed_members()[name].begin_step()

    def call_outside(self) -> Call:
        """What holds for a part of the model that is called by itself: what is active or in use."""
        return self._call(self._groups(self._names()), None, None)

    def end_forward(self) -> None:
        """Called after each forward of the model, also where it raised."""
        end(self)

    def call(self) -> ShelfCall:
        """The call under way in this thread."""
        return cast(ShelfCall, current(self))

    def checkpointing(self) -> bool:
        """Whether the model checkpoints activations while training."""
        return self.training and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())

    @property
    def model(self) -> nn.Module:
        """The model this shelf is attached to.

        Raises:
            AttachError: the shelf is detached.
        """
        if not self._model:
            raise AttachError("this shelf is detached", fix="load the folders again", where="Shelf")
        return self._model[0]

    def _names(self) -> Names:
        names = _USED.get().get(self.serial, self._active)
        known = {None, *self.members}.issuperset([names] if names is None or isinstance(names, str) else names)
        return names if known else None  # removed meanwhile

    def _call(
        self, groups: tuple[tuple[str, Rows | None], ...], task_ids: Tensor | None, batch: int | None
    ) -> ShelfCall:
        if is_switched_off(self):
            return ShelfCall((), None)
        members = []
        for name, rows in groups:
            own = task_ids if task_ids is None or rows is None else task_ids[list(rows.picked)]
            member = self._typed_members()[name]
            members.append((name, rows, member.call_for(own, None if rows else batch)))
        alone = groups[0][0] if len(groups) == 1 and groups[0][1] is None else None
        return ShelfCall(tuple(members), alone)

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

    def _check_headless(self, groups: tuple[tuple[str, Rows | None], ...]) -> None:
        headed = [name for name, rows in groups if rows is not None and self._typed_members()[name].head_names]
        if headed:
            raise TaskError(
                "the model runs with one set of task heads at a time",
                expected="adapters without task heads in a mixture",
                got=f"{', '.join(headed)} with heads of their own",
                where="adapter_names",
                fix="give each its own batch with shelf.using(name); attach(heads=()) trains and saves none",
            )

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
        self._handles.append(model.register_forward_hook(_ShelfDone(self), always_call=True))
        self._handles += hook_embedding(self, model)
        if hasattr(type(model), "generate"):
            self._handles.append(_Generate(self, model))

    def __setstate__(self, kept: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, kept)
        self.serial = new_serial(self)


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

    def __eq__(self, other: object) -> bool:
        mine = (self.examples, self.picked, self.batch)
        return isinstance(other, Rows) and mine == (other.examples, other.picked, other.batch)

    def __hash__(self) -> int:
        return hash((self.examples, self.picked, self.batch))

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


class _Generate:
    """The model's `generate`, with `adapter_names` beside its arguments; transformers' own refuses what it does not
    know.
    """

    def __init__(self, shelf: Shelf, model: nn.Module) -> None:
        self.shelf, self.earlier = shelf, vars(model).get("generate")
        vars(model)["generate"] = self

    def __call__(self, *args: Any, adapter_names: Names = None, **kwargs: Any) -> Any:
        """Generate with each prompt's adapters, one name for all or one per prompt."""
        generate = self.earlier or type(self.shelf.model).generate.__get__(self.shelf.model)  # type: ignore[attr-defined]
        if adapter_names is None:
            return generate(*args, **kwargs)
        with self.shelf.using(adapter_names):
            return generate(*args, **kwargs)

    def remove(self) -> None:
        """Put back what was there."""
        own = vars(self.shelf.model)
        if self.earlier is None:
            own.pop("generate", None)
        else:
            own["generate"] = self.earlier


class _HeadForward(OwnForward):
    """The forward of a module that uses a task head: with the values that the call's adapters bring."""

    def __init__(self, shelf: Shelf, module: nn.Module, name: str) -> None:
        super().__init__(module)
        self.shelf, self.prefix = shelf, f"{name}." if name else ""
        self.tied = {
            leaf: next(full for full, other in shelf.model.named_parameters() if other is own)
            for leaf, own in module._parameters.items()
            if own is not None
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes for the call under way."""
        name = self.shelf.call().headed
        if name is None:
            return self.run({}, args, kwargs)
        member = self.shelf._typed_members()[name]
        values = dict(zip(member.head_names, member.heads, strict=True))
        return self.run({leaf: values[full] for leaf, full in self.tied.items() if full in values}, args, kwargs)


class _ShelfHook(ModelHook):
    """Before the model runs: take `adapter_names` and `task_ids` from the call."""

    supernet: Any

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Forward pre-hook with kwargs."""
        names = kwargs.get("adapter_names")
        self.supernet.begin_forward(kwargs.get("task_ids"), batch_size(args, kwargs), names)
        taken = {"adapter_names", "task_ids"} if self.pop_task_ids else {"adapter_names"}
        return args, {name: value for name, value in kwargs.items() if name not in taken}


class _ShelfDone:
    """After the model ran, or raised."""

    def __init__(self, shelf: Shelf) -> None:
        self.shelf = shelf

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model, called also after an exception."""
        self.shelf.end_forward()


class _SharedInput(InputHook):
    """At one module: the input hooks of those of its adapters that work, each on its own examples."""

    supernet: Any

    def __init__(self, shelf: Shelf) -> None:
        super().__init__(cast(Any, shelf), [], None)
        self.hooks: dict[str, tuple[Any, ...]] = {}

    def change(self, hidden: Tensor, call: Call) -> Tensor:
        """See `InputHook`."""
        result = hidden
        for name, rows, seen in cast(ShelfCall, call).members:
            own = self.hooks.get(name, ())
            part = before = result if rows is None or not own else rows.take(hidden)
            for hook in own:
                part = hook.change(part, seen)
            if part is not before:
                result = part if rows is None else _put(hidden, result, rows, part)
        return result


class _SharedOutput(OutputHook):
    """At one module: the output hooks of those of its adapters that work, each on its own examples."""

    supernet: Any

    def __init__(self, shelf: Shelf) -> None:
        super().__init__(cast(Any, shelf), [], [])
        self.hooks: dict[str, tuple[Any, ...]] = {}

    def change(self, hidden: Tensor, target: Tensor, call: Call) -> Tensor:
        """See `OutputHook`."""
        result = target
        for name, rows, seen in cast(ShelfCall, call).members:
            own = self.hooks.get(name, ())
            part = before = result if rows is None or not own else rows.take(target)
            read = hidden if rows is None or not own else rows.take(hidden)
            for hook in own:
                part = hook.change(read, part, seen)
            if part is not before:
                result = part if rows is None else _put(target, result, rows, part)
        return result


def _put(old: Tensor, result: Tensor, rows: Rows, changed: Tensor) -> Tensor:
    """`result` with the rows of one member changed; copied from `old` by the first that changes something."""
    if result is old:
        result = old.clone(memory_format=torch.contiguous_format)
    rows.view(result)[rows.on(result.device)] = changed
    return result
