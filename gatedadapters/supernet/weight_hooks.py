"""The hooks that put paths at weights, for as long as the module that uses them runs.

A parameter lives in `module._parameters`, which attribute access consults last: what lies in the instance's `__dict__`
under the same name hides it. So the module computes with another weight, and no parameter was replaced: state dict,
optimiser and sharding never see it. It is taken away however the module ends, be it by an exception or because
gradient checkpointing has recomputed all it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gatedadapters.backbone.quantized import is_quantized
from gatedadapters.errors import TaskError
from gatedadapters.supernet.hooks import RUNNING, first_tensor

if TYPE_CHECKING:
    from gatedadapters.paths import WeightLoRA
    from gatedadapters.paths.low_rank_sum import LowRankSum
    from gatedadapters.supernet.adapters import Adapters

# Implementations of transformers' experts that multiply through torch's own functions; others get whole weights.
_TRANSPARENT = frozenset({None, "eager", "batched_mm", "grouped_mm"})

Call = tuple[tuple[Any, ...], dict[str, Any]]


class WeightHook:
    """Before a module runs: what its paths make of its weights takes their place.

    A batch of several tasks is cut up, since a weight has no examples: the module runs on the first task's tokens, and
    `WeightRestorer` runs it on the others'. Meanwhile all paths inside it see a batch of that one task.
    """

    def __init__(self, adapters: Adapters, module: str, keys: Mapping[str, list[str]]) -> None:
        self.adapters, self.module, self.keys = adapters, module, dict(keys)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Forward pre-hook with kwargs."""
        adapters = self.adapters
        restore(module, self.keys)
        adapters.cut.pop(self.module, None)
        if not RUNNING[adapters.serial]:
            return None
        tasks = adapters.tasks_of_batch()
        if len(tasks) < 2:
            with adapters.routed_to(tasks[0] if tasks else None):
                self.adapt(module)
            return None
        if not any(adapters.gate(key)[0] for keys in self.keys.values() for key in keys):
            return None
        rows = self.rows_of_tasks(args, kwargs)
        adapters.cut[self.module] = (args, kwargs, rows, adapters.routed)
        adapters.routed = next(iter(rows))  # until the restorer's turn
        self.adapt(module)
        return self.part(args, kwargs, rows[adapters.routed])

    def adapt(self, module: nn.Module) -> None:
        """Hide each weight that has an open path behind what the path makes of it."""
        implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
        transparent = implementation in _TRANSPARENT and not torch.compiler.is_compiling()
        for name, keys in self.keys.items():
            owner, parameter = owner_of(module, name)
            before = cast(Tensor, owner._parameters[parameter])
            weight: Tensor | LowRankSum = before
            for key in keys:
                is_open, gate = self.adapters.gate(key)
                if is_open:
                    weight = cast("WeightLoRA", self.adapters.paths[key]).lazy(weight, gate)
            if weight is not before:
                # A single matrix may go to kernels of any kind, and its copy costs little.
                lazy = is_quantized(before) or (transparent and before.dim() == 3)
                owner.__dict__[parameter] = weight if lazy else cast("LowRankSum", weight).dense()

    def rows_of_tasks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Tensor]:
        """For each task of the batch, the rows of the module's tensors that are its tokens.

        Raises:
            TaskError: the module's arguments do not tell.
        """
        ids = cast(Tensor, self.adapters.routed)
        first = first_tensor(args, kwargs)
        values = (*args, *kwargs.values())
        rows, tensors = len(first), [value for value in values if isinstance(value, Tensor)]
        path = cast("WeightLoRA", self.adapters.paths[next(iter(self.keys.values()))[0]])
        site = path.site
        # One argument with every token for every expert, expert by expert (Llama 4); else one row for each token.
        copies = site.experts if len(tensors) == 1 and site.traffic == site.experts else 1
        tokens = rows // copies
        plain = (Tensor, bool, int, float, str, type(None))
        others = any(not isinstance(value, plain) for value in values)  # counts of sorted rows, caches of past tokens
        if others or tokens % len(ids) or any(not self.is_whole(t) and len(t) != rows for t in tensors):
            raise TaskError(
                "a batch of several tasks cannot be told apart inside this module",
                expected="one row for each token of the batch in every argument",
                got=", ".join(str(list(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in values),
                where=self.module,
                fix="batches of one task each, use_cache=False where a cache is in the way, or weight_lora elsewhere",
            )
        owner = ids.to(first.device).repeat_interleave(tokens // len(ids)).repeat(copies)
        return {task: (owner == task).nonzero().flatten() for task in self.adapters.tasks_of_batch()}

    def is_whole(self, value: Tensor) -> bool:
        """Whether a module's argument has no rows of its own for tokens: one row for all, as positions may have, or a
        vector that is the model's (a router's correction).
        """
        if value.dim() == 0 or len(value) == 1:
            return True
        model = self.adapters.model
        return value.dim() == 1 and any(value is own for own in (*model.parameters(), *model.buffers()))

    def part(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor) -> Call:
        """The arguments of a call for some of the rows."""

        def some(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) and not self.is_whole(value) else value

        return tuple(some(value) for value in args), {name: some(value) for name, value in kwargs.items()}


class WeightRestorer:
    """After a module ran, or failed: its own weights come back, after the tasks that are left had their turn."""

    def __init__(self, hook: WeightHook) -> None:
        self.hook = hook

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook, always called."""
        hook, adapters = self.hook, self.hook.adapters
        pending = adapters.cut.pop(hook.module, None)
        try:
            if pending is None or output is None:
                return None
            whole_args, whole_kwargs, rows, _ = pending
            first, *others = rows.items()
            parts, order = [output], [first[1]]
            for task, own in others:
                restore(module, hook.keys)
                adapters.routed = task
                hook.adapt(module)
                given, named = hook.part(whole_args, whole_kwargs, own)
                parts.append(module.forward(*given, **named))
                order.append(own)
            return joined(parts, torch.cat(order).argsort(), hook.module)
        finally:
            restore(module, hook.keys)
            if pending is not None:
                adapters.routed = pending[3]


def hook_weights(adapters: Adapters, model: nn.Module) -> list[RemovableHandle]:
    """Put the hooks of all paths at weights where they go."""
    weights: dict[str, dict[str, list[str]]] = {}
    for key, path in adapters.typed_paths():
        if path.site.at_weight:
            weights.setdefault(path.site.host, {}).setdefault(path.site.weight_name, []).append(key)
    handles = []
    for name, keys in weights.items():
        module, hook = model.get_submodule(name), WeightHook(adapters, name, keys)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        # first of all: what others put at the module's output is for the whole batch
        handles.append(module.register_forward_hook(WeightRestorer(hook), prepend=True, always_call=True))
    return handles


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module among `module` and its descendants that has the parameter, and the parameter's last name."""
    inner, _, parameter = name.rpartition(".")
    return module.get_submodule(inner), parameter


def restore(module: nn.Module, parameters: Iterable[str]) -> None:
    """Let a module and those in it see their own parameters again."""
    for name in parameters:
        owner, parameter = owner_of(module, name)
        owner.__dict__.pop(parameter, None)


def joined(parts: Sequence[Any], order: Tensor, where: str) -> Any:
    """What a module returned for parts of the rows, as it would have for all of them: also where it returns several
    rows for each, one after the other (a router of flattened tokens).

    Raises:
        TaskError: the rows cannot be told.
    """
    first = parts[0]
    if isinstance(first, tuple | list):
        found = [joined(each, order, where) for each in zip(*parts, strict=True)]
        return found if isinstance(first, list) else tuple(found)
    if not isinstance(first, Tensor | bool | int | float | str | None):
        got: Any = type(first).__name__
    elif not isinstance(first, Tensor):
        return first
    else:
        got = sum(len(part) for part in parts) if first.dim() else 0
        if got and got % len(order) == 0:
            by_row = rearrange(torch.cat(list(parts)), "(row each) ... -> row each ...", row=len(order))
            return rearrange(by_row[order], "row each ... -> (row each) ...")
    raise TaskError(
        "what this module returns cannot be told apart by task",
        expected=f"tensors with a multiple of {len(order)} rows",
        got=got,
        where=where,
        fix="batches of one task each, or weight_lora elsewhere",
    )
