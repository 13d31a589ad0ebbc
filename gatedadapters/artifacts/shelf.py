"""Several saved adapters on one model: one of them at work, or each example's own."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, cast

from torch import Tensor, nn

from gatedadapters.artifacts.combining import WHERE, combine
from gatedadapters.artifacts.shelf_calls import Groups, Names, ShelfCall, check_known, fit, groups_of
from gatedadapters.artifacts.shelf_hooks import Generate, HeadForward, SharedInput, SharedOutput, ShelfDone, ShelfHook
from gatedadapters.backbone.attached import apply_requires_grad, trained_originally
from gatedadapters.backbone.fingerprint import Fingerprint, backbone_fingerprint, backbone_modules
from gatedadapters.errors import ArtifactError, AttachError, TaskError
from gatedadapters.runtime.call import Call, begin, current, end, forget, is_switched_off, new_serial, switched_off
from gatedadapters.structure.folder import Base, read
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import adapters_of, check_no_adapters, move_beside, uncollected
from gatedadapters.supernet.hooks import (
    InputHook,
    hook_embedding,
    point_hooks,
    register_hook,
)
from gatedadapters.supernet.supernet import NAME

_CHANGING = threading.RLock()  # held while adapters are put on a shelf, or taken off
_COUNTING = threading.Lock()  # held while calls under way are counted; not on the shelf, which is copied

_USED: ContextVar[Mapping[int, Names]] = ContextVar("adapters in use", default=MappingProxyType({}))
"""By a shelf's serial: what `Shelf.using` says in this thread or asyncio task."""


class Shelf(nn.Module):
    """Saved adapters by name, on one model, registered there as `gated_adapters`.

    Switching moves pointers alone: its cost depends neither on the backbone nor on the adapters, and adapters that are
    not at work cost memory but no time. Task heads that were saved with adapters work where those do; the model's own
    heads are never written to. Which adapters a call uses is decided when it begins and holds throughout it, so threads
    may call, activate, use, add and remove as they like: a call ends with adapters that were removed meanwhile.

        shelf = ga.Shelf.load(model, {"mood": "out/mood", "topic": "out/topic"})  # the first is active
        shelf.activate("topic")
        model(**batch, adapter_names=["mood", "topic", None])  # each example its own; None is the backbone alone
        model.generate(**inputs, adapter_names=["mood", "topic", None])
        with shelf.using("mood"):  # in this thread or asyncio task alone
            pipeline(texts)
        shelf.combine("both", {"mood": 0.7, "topic": 0.3})  # a weighted sum, as one more

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
        self._hooks: dict[tuple[str, type], tuple[SharedInput | SharedOutput, Any]] = {}
        self._heads: dict[str, HeadForward] = {}
        self._required_grad = trained_originally(model)
        self._identities: dict[frozenset[str], tuple[Any, Fingerprint]] = {}  # by task heads left out
        self._placed = 0  # so far; a name may be given again
        self._calls = 0  # under way
        self._removed: list[Adapters] = []  # whose hooks calls under way may still need

    # -- what is on it -------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        model: nn.Module,
        folders: Mapping[str, str | Path],
        *,
        base: Base = "same",
        verify: bool = True,
        allow_nonfinite: bool = False,
    ) -> Self:
        """Put saved adapters on `model` and activate the first. Of the backbone nothing is copied.

        Args:
            model: the backbone (and heads) that all of them were made for, no adapters attached.
            folders: what `Adapters.save` wrote, or ids of repositories on the hub, by the name each shall have.
            base: see `load_adapters`, as for the others.
            verify: check the digests of the files.
            allow_nonfinite: also load infinities and NaN.

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
                shelf.add(name, folder, base=base, verify=verify, allow_nonfinite=allow_nonfinite)
            shelf.activate(next(iter(folders)))
        except BaseException:
            shelf.detach()
            raise
        return shelf

    def add(
        self,
        name: str,
        folder: str | Path,
        *,
        base: Base = "same",
        revision: str | None = None,
        verify: bool = True,
        allow_nonfinite: bool = False,
    ) -> Adapters:
        """Load saved adapters under a new name, without activating them; see `load_adapters` for the arguments.

        Raises:
            ArtifactError: the name is taken or cannot be one, or see `load_adapters`; nothing has changed then.
        """
        with _CHANGING, uncollected():
            self._check_name(name, "Shelf.add")
            saved = read(
                self.model,
                folder,
                base=base,
                revision=revision,
                verify=verify,
                allow_nonfinite=allow_nonfinite,
                identify=self._identify,
            )
            at_weight = [key for key, path in saved.paths.items() if path.site.at_weight]
            if at_weight:
                raise ArtifactError(
                    "paths at weights change them for a whole batch, and cannot take turns with others",
                    expected="paths at what modules take or return",
                    got=at_weight[0],
                    where=f"Shelf.add({name!r})",
                    fix="load_adapters(model, folder) for these alone, or search without weight_lora",
                )
            member = adapters_of(self.model, saved.structure, saved.paths)
            member.origin = saved.origin
            return self._put(name, member, saved.heads)

    def combine(self, name: str, weights: Mapping[str, float], *, rank: int | None = None) -> Adapters:
        """Put the weighted sum of adapters on the shelf under a new name, without activating it; it can be saved.

        Changes of weights (LoRA), factors, biases and gains at one place add up in one path, hidden units of
        bottlenecks stand side by side, other kinds stay paths of their own. For LoRA this is the exact sum of the
        weighted maps, of all ranks together (peft's `cat`; its `linear` adds the factors instead, so that each
        adapter's up meets the other's down). With `rank`, every LoRA is cut to so many ranks by its singular values
        (peft's `svd`).

        Args:
            name: of the sum.
            weights: by the names of the adapters, negative ones included.
            rank: the most ranks of a LoRA; None for the exact sum.

        Raises:
            ArtifactError: an unknown name, a name that is taken, a weight that is not finite, or adapters with task
                heads or several tasks; nothing has changed then.
        """
        with _CHANGING:
            self._check_name(name, WHERE)
            for each in weights:
                check_known(each, WHERE, self.typed_members())
            structure, paths = combine(self.typed_members(), weights, rank=rank)
            return self._put(name, adapters_of(self.model, structure, paths), {})

    @property
    def bytes(self) -> dict[str, int]:
        """Memory of each of the adapters, by name: their parameters and buffers, task heads included."""
        return {
            name: sum(tensor.nbytes for tensor in (*member.parameters(), *member.buffers()))
            for name, member in self.typed_members().items()
        }

    def _identify(self, heads: frozenset[str]) -> Fingerprint:
        """The backbone's fingerprint, computed again where a parameter was exchanged or changed since."""
        if self.model.training:  # a step of an optimiser may be under way
            return backbone_fingerprint(self.model, skip=heads)
        state = tuple(
            (parameter.data_ptr(), parameter._version)
            for _, module in backbone_modules(self.model)
            for parameter in module._parameters.values()
            if parameter is not None
        )
        if heads not in self._identities or self._identities[heads][0] != state:
            self._identities[heads] = state, backbone_fingerprint(self.model, skip=heads)
        return self._identities[heads][1]

    def _check_name(self, name: str, where: str) -> None:
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ArtifactError(
                "adapters cannot have this name",
                expected="a name without dots that no module has itself",
                got=repr(name),
                where=where,
                fix="choose another name",
            )
        if name in self.members:
            raise ArtifactError(
                "the name is taken",
                expected=f"other names than {', '.join(self.members)}",
                got=repr(name),
                where=where,
                fix=f"choose another name, or call shelf.remove({name!r}) first",
            )

    def _put(self, name: str, member: Adapters, heads: Mapping[str, Tensor]) -> Adapters:
        """Put compact adapters on the model under a name; if that fails, it is left as it was."""
        model = self.model
        self._placed += 1
        member.head_names, member.on_shelf = tuple(heads), self._placed
        for head, value in heads.items():
            own = model.get_parameter(head)
            member.heads.append(nn.Parameter(value.to(own.device, own.dtype)))
        member._model.append(model)
        member.train(model.training)
        move_beside(member, model)
        try:
            for head in member.head_names:
                own = model.get_parameter(head)
                own.requires_grad_(True)
                self._own_head(own)
            for module, hook in point_hooks(member):
                shared = SharedInput if isinstance(hook, InputHook) else SharedOutput
                if (module, shared) not in self._hooks:
                    new = shared(self)
                    self._hooks[module, shared] = new, register_hook(new, model.get_submodule(module))
                hooks = self._hooks[module, shared][0].hooks
                hooks[member.on_shelf] = (*hooks.get(member.on_shelf, ()), hook)
            self._replace_members({**self.typed_members(), name: member})
        except BaseException:
            self._unhook(member)
            raise
        return member

    def _replace_members(self, members: Mapping[str, Adapters]) -> None:
        """Exchange the whole dictionary at once: other threads may be walking through the old one."""
        vars(self.members)["_modules"] = dict(members)

    def _own_head(self, parameter: nn.Parameter) -> None:
        """Let each module that uses this head run with the values that a call's adapters bring."""
        for name, module in backbone_modules(self.model):
            uses = any(own is parameter for own in module._parameters.values())
            if uses and name not in self._heads:
                self._heads[name] = HeadForward(self, module, name)
                self._heads[name].install()

    def remove(self, name: str) -> None:
        """Take adapters off the shelf; if they are active, the backbone alone is left at work.

        Raises:
            ArtifactError: unknown name.
        """
        with _CHANGING:
            check_known(name, "Shelf.remove", self.typed_members())
            if self._active == name:
                self._active = None
            member = self.typed_members()[name]
            self._replace_members({other: kept for other, kept in self.typed_members().items() if other != name})
            with _COUNTING:
                self._removed.append(member)
            self._unhook_removed()

    def _unhook_removed(self) -> None:
        """Take out the hooks of adapters that were removed, unless a call under way may still need them."""
        if not self._removed:
            return
        if not _CHANGING.acquire(blocking=False):
            return  # the end of a later call does it
        try:
            with _COUNTING:
                gone, self._removed = ([], self._removed) if self._calls else (self._removed, [])
            for member in gone:
                self._unhook(member)
        finally:
            _CHANGING.release()

    def _unhook(self, member: Adapters) -> None:
        for key, (shared, handle) in list(self._hooks.items()):
            shared.hooks.pop(member.on_shelf, None)
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
        for member in self.typed_members().values():
            member._model.clear()
        self._model.clear()
        forget(self.serial)
        return model

    # -- who is at work ------------------------------------------------------------------------------------------------

    @property
    def head_names(self) -> tuple[str, ...]:
        """Task heads of the model that some of the adapters bring values for."""
        return tuple(dict.fromkeys(head for member in self.typed_members().values() for head in member.head_names))

    @property
    def active(self) -> str | None:
        """Whose adapters work in a call that names none; None for the backbone alone, or within `using` a mixture."""
        names = self._names(self.typed_members())
        return names if isinstance(names, str) else None

    @property
    def current(self) -> Adapters | None:
        """The active adapters."""
        members = self.typed_members()
        names = self._names(members)
        return members[names] if isinstance(names, str) else None

    def activate(self, name: str | None) -> None:
        """From now on these adapters work in every call that names none, in all threads; None leaves the backbone
        alone.

        Calls that are under way go on with the adapters they began with.

        Raises:
            ArtifactError: unknown name.
            AttachError: the shelf is detached.
        """
        groups_of(name, self.typed_members(), "Shelf.activate")
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
        groups_of(names, self.typed_members(), "Shelf.using")
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
        with _COUNTING:
            self._calls += 1  # before anything is looked up, and also if this raises: `end_forward` is called then, too
        given, members = names is not None, self.typed_members()
        names = names if given else self._names(members)
        each = names is not None and not isinstance(names, str)
        if each and not fit(cast(Sequence[Any], names), batch, exactly=given):
            raise TaskError(
                "adapter names do not match the batch",
                expected=f"{batch or 'as many'} names, one per example",
                got=repr(names),
                where="adapter_names",
                fix="name each example's adapters, None for the backbone",
            )
        groups = groups_of(names, members, batch=batch)
        begin(self, self._call(groups, task_ids, batch))
        for _, member, _ in groups:
            member.begin_step()

    def call_outside(self) -> Call:
        """What holds for a part of the model that is called by itself: what is active or in use."""
        members = self.typed_members()
        return self._call(groups_of(self._names(members), members), None, None)

    def end_forward(self) -> None:
        """Called after each forward of the model, also where it raised."""
        with _COUNTING:
            self._calls -= 1
        end(self)
        self._unhook_removed()

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

    def _names(self, members: Mapping[str, Adapters]) -> Names:
        names = _USED.get().get(self.serial, self._active)
        known = {None, *members}.issuperset([names] if names is None or isinstance(names, str) else names)
        return names if known else None  # removed meanwhile

    def _call(self, groups: Groups, task_ids: Tensor | None, batch: int | None) -> ShelfCall:
        if is_switched_off(self):
            return ShelfCall((), None)
        seen = []
        for _, member, rows in groups:
            own = task_ids if task_ids is None or rows is None else task_ids[list(rows.picked)]
            seen.append((member, rows, member.call_for(own, None if rows else batch)))
        alone = groups[0][1] if len(groups) == 1 and groups[0][2] is None else None
        return ShelfCall(tuple(seen), alone)

    def typed_members(self) -> Mapping[str, Adapters]:
        """The adapters by name, as they are now: what is added and removed later does not change this mapping."""
        return cast(Mapping[str, Adapters], self.members._modules)

    def _hook(self) -> None:
        model = self.model
        pop = "task_ids" not in inspect.signature(model.forward).parameters
        hook = ShelfHook(cast(Any, self), pop_task_ids=pop)
        self._handles.append(model.register_forward_pre_hook(hook, with_kwargs=True))
        self._handles.append(model.register_forward_hook(ShelfDone(self), always_call=True))
        self._handles += hook_embedding(self, model)
        if hasattr(type(model), "generate"):
            self._handles.append(Generate(self, model))

    def __setstate__(self, kept: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, kept)
        self.serial, self._calls = new_serial(self), 0
