"""Paths at weights: a module runs with what its paths make of its weights.

A weight that several modules share, or that a module uses in a way of its own (fused experts, a state-space mixer), has
no module boundary to put hooks at. There the module that uses the weight gets a forward of its own (`OwnForward`),
which runs it with other tensors. No parameter is replaced, so state dict, optimiser and sharding never see it; the
module is not written to, so calls in other threads do not either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from gatedadapters.backbone.quantized import is_quantized
from gatedadapters.errors import TaskError
from gatedadapters.paths import WeightLoRA
from gatedadapters.paths.low_rank_sum import LowRankSum
from gatedadapters.runtime.call import Call, replaced
from gatedadapters.runtime.forward import OwnForward, parameter_of
from gatedadapters.supernet.hooks import Arguments, hidden_argument
from gatedadapters.supernet.supernet import Supernet

# Implementations of transformers' experts that multiply through torch's own functions; others get whole weights.
_TRANSPARENT = frozenset({None, "eager", "batched_mm", "grouped_mm"})


class WeightForward(OwnForward):
    """The forward of a module that uses weights with paths at them.

    A weight has no examples, so a batch of several tasks is cut up: the module runs on each task's tokens with that
    task's weights, and meanwhile all paths inside it see a batch of that one task.

    Args:
        supernet: whose paths.
        module: the module that uses the weights.
        name: the module's name in the model.
        keys: the paths at each weight, by the weight's name inside the module.
    """

    def __init__(self, supernet: Supernet, module: nn.Module, name: str, keys: Mapping[str, list[str]]) -> None:
        super().__init__(module)
        self.supernet, self.name, self.keys = supernet, name, dict(keys)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes for the call under way.

        Raises:
            TaskError: a batch of several tasks cannot be told apart inside this module.
        """
        call = self.supernet.call()
        if not call.runs:
            return self.run({}, args, kwargs)
        tasks = call.tasks()
        if len(tasks) < 2:
            return self.run(self.weights(Call(runs=True, task=tasks[0] if tasks else None)), args, kwargs)
        if not any(self.supernet.gate(key, call)[0] for keys in self.keys.values() for key in keys):
            return self.run({}, args, kwargs)
        rows = self.rows_of_tasks(call, args, kwargs)
        parts = []
        for task, own in rows.items():
            alone = Call(runs=True, task=task)
            given, named = self.part(args, kwargs, own)
            with replaced(self.supernet, alone):
                parts.append(self.run(self.weights(alone), given, named))
        return rejoin_rows(parts, torch.cat(list(rows.values())).argsort(), self.name)

    def weights(self, call: Call) -> dict[str, Any]:
        """What the open paths make of the weights for a call of one task; weights without an open path are left out."""
        implementation = getattr(getattr(self.module, "config", None), "_experts_implementation", None)
        transparent = implementation in _TRANSPARENT and not torch.compiler.is_compiling()
        found: dict[str, Any] = {}
        for name, keys in self.keys.items():
            before = parameter_of(self.module, name)
            weight: Tensor | LowRankSum = before
            for key in keys:
                is_open, gate = self.supernet.gate(key, call)
                if is_open:
                    weight = cast(WeightLoRA, self.supernet.paths[key]).lazy(weight, gate)
            if weight is not before:
                # A single matrix may go to kernels of any kind, and its copy costs little.
                lazy = is_quantized(before) or (transparent and before.dim() == 3)
                found[name] = weight if lazy else cast(LowRankSum, weight).dense()
        return found

    def rows_of_tasks(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Tensor]:
        """For each task of the batch, the rows of the module's tensors that are its tokens.

        Raises:
            TaskError: the module's arguments do not tell.
        """
        ids = cast(Tensor, call.task)
        first = hidden_argument(args, kwargs)
        values = (*args, *kwargs.values())
        rows, tensors = len(first), [value for value in values if isinstance(value, Tensor)]
        path = cast(WeightLoRA, self.supernet.paths[next(iter(self.keys.values()))[0]])
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
                where=self.name,
                fix="batches of one task each, use_cache=False where a cache is in the way, or weight_lora elsewhere",
            )
        owner = ids.to(first.device).repeat_interleave(tokens // len(ids)).repeat(copies)
        return {task: (owner == task).nonzero().flatten() for task in call.tasks()}

    def is_whole(self, value: Tensor) -> bool:
        """Whether a module's argument has no rows of its own for tokens: one row for all, as positions may have, or a
        vector that is the model's (a router's correction).
        """
        if value.dim() == 0 or len(value) == 1:
            return True
        model = self.supernet.model
        return value.dim() == 1 and any(value is own for own in (*model.parameters(), *model.buffers()))

    def part(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: Tensor) -> Arguments:
        """The arguments of a call for some of the rows."""

        def some(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) and not self.is_whole(value) else value

        return tuple(some(value) for value in args), {name: some(value) for name, value in kwargs.items()}


def weight_forwards(supernet: Supernet, model: nn.Module) -> Iterator[WeightForward]:
    """The forwards of all modules that use weights with paths at them, not yet installed."""
    weights: dict[str, dict[str, list[str]]] = {}
    for key, path in supernet.typed_paths():
        if path.site.at_weight:
            weights.setdefault(path.site.host, {}).setdefault(path.site.weight_name, []).append(key)
    for name, keys in weights.items():
        yield WeightForward(supernet, model.get_submodule(name), name, keys)


def rejoin_rows(parts: Sequence[Any], order: Tensor, where: str) -> Any:
    """What a module returned for parts of the rows, as it would have for all of them: also where it returns several
    rows for each, one after the other (a router of flattened tokens).

    Raises:
        TaskError: the rows cannot be told.
    """
    first = parts[0]
    if isinstance(first, tuple | list):
        found = [rejoin_rows(each, order, where) for each in zip(*parts, strict=True)]
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
