"""The selected elements of one tensor, and how their values get into the tensor.

Of a tensor that is sharded over processes, every process holds all values and writes those that lie in its shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn

from gatedadapters.errors import TrainingError
from gatedadapters.masking.live import Pattern
from gatedadapters.runtime.sharding import is_shard, local, rows_held, whole

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class TunedElements(nn.Module):
    """The selected elements of one parameter tensor.

    Attributes:
        values: (selected,) the present values, in float32 (in float64 for a float64 tensor). Small steps add up here,
            where a bfloat16 weight would round them away.
        pattern: the positions of the elements.
        originals: (selected,) the values before training, in the tensor's type.
        owners: every (module, attribute) that holds the tensor.
    """

    def __init__(self, pattern: Pattern, originals: Tensor, values: Tensor | None = None) -> None:
        super().__init__()
        self.pattern, self.originals = pattern, originals
        kind = torch.promote_types(originals.dtype, torch.float32)
        self.values = nn.Parameter((originals if values is None else values).to(originals.device, kind, copy=True))
        self.owners: list[tuple[nn.Module, str]] = []
        self.spread = False  # whether the tensor is sharded over processes
        self._written: int | None = None

    @property
    def weight(self) -> Tensor:
        """The tensor; call `runtime.sharding.reshard` first to find the shard of a sharded one."""
        module, name = self.owners[0]
        return cast(Tensor, module._parameters[name])

    def current(self, weight: Tensor) -> Tensor:
        """`weight` after the present values were written into it.

        Optimisers that compute the loss several times in a step, such as LBFGS, thus see their changes.

        Raises:
            TrainingError: the weight was gathered from shards, so that it is too late to write into these.
        """
        if self.pending:
            if self.spread:
                raise TrainingError(
                    "values of a sparse delta were changed, but not written into the shards before the forward pass",
                    expected="delta.write() after a change by hand, an optimiser with one loss a step",
                    got="values that were not written",
                    where="a sharded weight",
                    fix="call delta.write(); with LBFGS, train without sharding",
                )
            self.write()
        return weight

    def present(self) -> Tensor:
        """What the tensor holds at the selected elements, (selected,); gathered, so all processes call this."""
        return self.pattern.gather(whole(self.weight.detach()))

    def _held(self) -> tuple[Tensor, Tensor, slice]:
        """What this process holds of the tensor, flat; the positions of selected elements in it; which of them."""
        weight = self.weight
        flat, indices = local(weight.detach()).view(-1), self.pattern.indices()
        if not is_shard(weight):
            return flat, indices, slice(None)
        each = self.pattern.rows * self.pattern.width // max(1, len(weight))
        bounds = torch.tensor(rows_held(weight), device=indices.device) * each
        first, last = torch.searchsorted(indices, bounds).tolist()
        return flat, indices[first:last] - bounds[0], slice(first, last)

    @torch.no_grad()
    def write(self, values: Tensor | None = None) -> None:
        """Write the present values, or the given ones, into the tensor."""
        flat, indices, which = self._held()
        flat.index_copy_(0, indices, (self.values if values is None else values)[which].to(flat))
        if values is None:
            self._written = self.values._version

    @torch.no_grad()
    def differs(self, values: Tensor | None = None) -> Tensor:
        """Whether what this process holds of the tensor has other bits than the present values, or the given
        ones; a scalar bool tensor.
        """
        flat, indices, which = self._held()
        wanted = (self.values if values is None else values)[which].to(flat)
        bits = _BITS[flat.element_size()]
        return (flat[indices].view(bits) != wanted.view(bits)).any()

    @property
    def pending(self) -> bool:
        """Whether the values have changed since they were last written."""
        return self.values._version != self._written

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # model.to(bfloat16) changes the type of the originals, as of the weights, and leaves that of the values.
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        nn.Module._apply(self, keep_dtype, recurse)
        self.originals = fn(self.originals)
        self.pattern = self.pattern.to(self.values.device)
        self._written = None
        return self
