"""The selected elements of one tensor, and their way into it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn

from gatedadapters.masking.live import Pattern

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Tuned(nn.Module):
    """The selected elements of one parameter tensor.

    Attributes:
        values: (selected,) what they are now, in fp32 (float64 of a float64 tensor): small steps add up here that a
            bf16 weight would round away.
        pattern: which elements they are.
        originals: (selected,) what they were, in the tensor's type.
    """

    def __init__(self, pattern: Pattern, originals: Tensor, values: Tensor | None = None) -> None:
        super().__init__()
        self.pattern, self.originals = pattern, originals
        kind = torch.promote_types(originals.dtype, torch.float32)
        self.values = nn.Parameter((originals if values is None else values).to(originals.device, kind, copy=True))
        self.places: list[tuple[nn.Module, str]] = []
        self._written: int | None = None

    @property
    def weight(self) -> Tensor:
        """The parameter whose elements these are."""
        module, name = self.places[0]
        return cast(Tensor, module._parameters[name])

    def current(self, weight: Tensor) -> Tensor:
        """`weight` with the values in it: optimisers that look at the loss within a step, as LBFGS, see their steps."""
        if self.pending:
            self.write()
        return weight

    @torch.no_grad()
    def write(self, values: Tensor | None = None) -> None:
        """Put the values (or others) into the weight."""
        weight = self.weight
        weight.view(-1).index_copy_(0, self.pattern.indices(), (self.values if values is None else values).to(weight))
        if values is None:
            self._written = self.values._version

    @torch.no_grad()
    def differs(self, values: Tensor | None = None) -> Tensor:
        """Whether the weight holds anything but the values (or others), a scalar bool tensor; compared by bits."""
        weight = self.weight
        wanted = (self.values if values is None else values).to(weight)
        bits = _BITS[weight.element_size()]
        return (self.pattern.gather(weight).view(bits) != wanted.view(bits)).any()

    @property
    def pending(self) -> bool:
        """Whether the values have moved since they were written."""
        return self.values._version != self._written

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Values stay fp32 under model.to(bfloat16); originals become what the weight becomes.
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        nn.Module._apply(self, keep_dtype, recurse)
        self.originals = fn(self.originals)
        self.pattern = self.pattern.to(self.values.device)
        self._written = None
        return self
