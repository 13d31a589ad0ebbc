"""What a shelf hangs on its model: hooks that take a call's adapters, and run each on its own examples."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from gatedadapters.artifacts.shelf_calls import Names, ShelfCall, put
from gatedadapters.runtime.call import Call
from gatedadapters.runtime.forward import OwnForward
from gatedadapters.supernet.hooks import Arguments, InputHook, ModelHook, OutputHook, batch_size


class OnModel(Protocol):
    """What hooks need of a `Shelf`."""

    @property
    def model(self) -> nn.Module:
        """The model that the shelf is on."""

    def call(self) -> ShelfCall:
        """The call under way in this thread."""

    def end_forward(self) -> None:
        """Called after each forward of the model, also where it raised."""

    def using(self, names: Names) -> AbstractContextManager[None]:
        """Within this context these adapters work."""


class Generate:
    """The model's `generate`, with `adapter_names` beside its arguments; transformers' own refuses what it does not
    know.
    """

    def __init__(self, shelf: OnModel, model: nn.Module) -> None:
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


class HeadForward(OwnForward):
    """The forward of a module that uses a task head: with the values that the call's adapters bring."""

    def __init__(self, shelf: OnModel, module: nn.Module, name: str) -> None:
        super().__init__(module)
        self.shelf, self.prefix = shelf, f"{name}." if name else ""
        self.tied = {
            leaf: next(full for full, other in shelf.model.named_parameters() if other is own)
            for leaf, own in module._parameters.items()
            if own is not None
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes for the call under way."""
        member = self.shelf.call().headed
        if member is None:
            return self.run({}, args, kwargs)
        values = dict(zip(member.head_names, member.heads, strict=True))
        return self.run({leaf: values[full] for leaf, full in self.tied.items() if full in values}, args, kwargs)


class ShelfHook(ModelHook):
    """Before the model runs: take `adapter_names` and `task_ids` from the call."""

    supernet: Any

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Forward pre-hook with kwargs."""
        names = kwargs.get("adapter_names")
        self.supernet.begin_forward(kwargs.get("task_ids"), batch_size(args, kwargs), names)
        taken = {"adapter_names", "task_ids"} if self.pop_task_ids else {"adapter_names"}
        return args, {name: value for name, value in kwargs.items() if name not in taken}


class ShelfDone:
    """After the model ran, or raised."""

    def __init__(self, shelf: OnModel) -> None:
        self.shelf = shelf

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook of the model, called also after an exception."""
        self.shelf.end_forward()


class SharedInput(InputHook):
    """At one module: the input hooks of those of its adapters that work, each on its own examples."""

    supernet: Any

    def __init__(self, shelf: OnModel) -> None:
        super().__init__(cast(Any, shelf), [], None)
        self.hooks: dict[int, tuple[Any, ...]] = {}  # by `Adapters.on_shelf`

    def change(self, hidden: Tensor, call: Call) -> Tensor:
        """See `InputHook`."""
        result = hidden
        for member, rows, seen in cast(ShelfCall, call).members:
            own = self.hooks.get(member.on_shelf, ())
            part = before = result if rows is None or not own else rows.take(hidden)
            for hook in own:
                part = hook.change(part, seen)
            if part is not before:
                result = part if rows is None else put(hidden, result, rows, part)
        return result


class SharedOutput(OutputHook):
    """At one module: the output hooks of those of its adapters that work, each on its own examples."""

    supernet: Any

    def __init__(self, shelf: OnModel) -> None:
        super().__init__(cast(Any, shelf), [], [])
        self.hooks: dict[int, tuple[Any, ...]] = {}  # by `Adapters.on_shelf`

    def change(self, hidden: Tensor, target: Tensor, call: Call) -> Tensor:
        """See `OutputHook`."""
        result = target
        for member, rows, seen in cast(ShelfCall, call).members:
            own = self.hooks.get(member.on_shelf, ())
            part = before = result if rows is None or not own else rows.take(target)
            read = hidden if rows is None or not own else rows.take(hidden)
            for hook in own:
                part = hook.change(read, part, seen)
            if part is not before:
                result = part if rows is None else put(target, result, rows, part)
        return result
