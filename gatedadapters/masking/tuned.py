"""The selected elements of one tensor, and how their values get into the tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn

from gatedadapters.masking.live import Pattern

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
        self._written: int | None = None

    @property
    def weight(self) -> Tensor:
        """The tensor."""
        module, name = self.owners[0]
        return cast(Tensor, module._parameters[name])

    def current(self, weight: Tensor) -> Tensor:
        """`weight` after the present values were written into it.

        Optimisers that compute the loss several times in a step, such as LBFGS, thus see their changes.
        """
        if self.pending:
            self.write()
        return weight

    @torch.no_grad()
    def write(self, values: Tensor | None = None) -> None:
        """Write the present values, or the given ones, into the tensor."""
        weight = self.weight
        weight.view(-1).index_copy_(0, self.pattern.indices(), (self.values if values is None else values).to(weight))
        if values is None:
            self._written = self.values._version

    @torch.no_grad()
    def differs(self, values: Tensor | None = None) -> Tensor:
        """Whether the tensor holds other bits than the present values, or the given ones; a scalar bool tensor."""
        weight = self.weight
        wanted = (self.values if values is None else values).to(weight)
        bits = _BITS[weight.element_size()]
        return (self.pattern.gather(weight).view(bits) != wanted.view(bits)).any()

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
