"""The selected elements of one tensor, and how their values get into the tensor.

Of a tensor that is sharded over processes, each process holds an equal share of the values, as FSDP holds weights, so
that clipping, optimisers and checkpoints treat them alike; and the originals of the elements in its shard. The gradient
of all values exists on every process from a tensor's backward to the end of the pass, and the values while they are
written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self, cast

import torch
from torch import Tensor, nn

from gatedadapters.errors import TrainingError
from gatedadapters.masking.live import Pattern
from gatedadapters.runtime.sharding import is_shard, local, mean_of, rows_held, spread_like, whole

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class TunedElements(nn.Module):
    """The selected elements of one parameter tensor.

    Attributes:
        values: (selected,) the present values, in float32 (in float64 for a float64 tensor). Small steps add up here,
            where a bfloat16 weight would round them away. Of a sharded tensor, a DTensor.
        pattern: the positions of the elements.
        originals: (selected,) the values before training, in the tensor's type; of a sharded tensor, those in this
            process's shard.
        owners: every (module, attribute) that holds the tensor.
    """

    def __init__(self, pattern: Pattern, originals: Tensor, values: Tensor | None = None) -> None:
        super().__init__()
        self.pattern, self.originals = pattern, originals
        kind = torch.promote_types(originals.dtype, torch.float32)
        self.values = nn.Parameter((originals if values is None else values).to(originals.device, kind, copy=True))
        self.owners: list[tuple[nn.Module, str]] = []
        self._written: int | None = None
        self._in_shard: Tensor | None = None  # of a sharded tensor: what was written into this process's shard last
        self._collector: Tensor | None = None  # likewise: takes the gradients of all values

    @property
    def spread(self) -> bool:
        """Whether the values are spread over processes, with the tensor."""
        return self._collector is not None

    @property
    def leaf(self) -> Tensor:
        """What forward passes take for the values, so that it gets their gradient, (selected,)."""
        if self._collector is None:
            return self.values
        return self._collector if self.values.requires_grad else self._collector.detach()

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

    def share_out(self) -> nn.Parameter:
        """Keep this process's share of the values and originals alone; the tensor is sharded.

        Returns:
            The parameter that now stands for the values.
        """
        weight, old = self.weight, self.values
        _, _, which = self._held()
        written = not self.pending
        self.originals = self.originals[which].clone()
        self.values = nn.Parameter(spread_like(old.detach(), weight), requires_grad=old.requires_grad)
        home = local(self.values).device
        self.pattern = self.pattern.to(home)
        # One element, seen as many: nobody reads its values.
        self._collector = old.new_zeros(1, device=home).expand(len(self.pattern)).detach().requires_grad_()
        self._in_shard = old.detach()[which].to(weight.dtype)
        self._written = self.values._version if written else None
        return self.values

    def take_in(self) -> None:
        """Hold all values again, as if the tensor were not sharded; all processes call this."""
        if self.spread:
            values = whole(self.values)
            self.values = nn.Parameter(values, requires_grad=self.values.requires_grad)
            self._collector = self._in_shard = self._written = None

    def has_gradient(self) -> Tensor:
        """Whether the last backward pass gave a gradient to values that are spread; a scalar bool tensor."""
        return torch.tensor(self._collector is not None and self._collector.grad is not None)

    @torch.no_grad()
    def exchange(self) -> None:
        """Add the mean of all processes' gradients to that of this process's share; all processes call this."""
        assert self._collector is not None
        found, self._collector.grad = self._collector.grad, None
        mean = mean_of(torch.zeros_like(self._collector) if found is None else found, self.values)
        self.values.grad = mean if self.values.grad is None else self.values.grad + mean

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
        return flat, (indices[first:last] - bounds[0]).to(flat.device), slice(first, last)

    @torch.no_grad()
    def write(self) -> None:
        """Write the present values into the tensor; of a sharded one, all processes call this."""
        flat, indices, which = self._held()
        present = whole(self.values.detach())[which].to(flat)
        flat.index_copy_(0, indices, present)
        self._in_shard = present if self.spread else None
        self._written = self.values._version

    @torch.no_grad()
    def write_originals(self) -> None:
        """Write the values before training into the tensor."""
        flat, indices, which = self._held()
        flat.index_copy_(0, indices, (self.originals if self.spread else self.originals[which]).to(flat))

    @torch.no_grad()
    def differs(self) -> Tensor:
        """Whether what this process holds of the tensor has other bits than the present values; a scalar bool tensor.
        All processes call this if values that are spread have changed since they were last written.
        """
        if self._in_shard is None or self.pending:
            _, _, which = self._held()
            return self._other_bits(whole(self.values.detach())[which])
        return self._other_bits(self._in_shard)

    def differs_from_originals(self) -> Tensor:
        """Whether it has other bits than before training; a scalar bool tensor."""
        _, _, which = self._held()
        return self._other_bits(self.originals if self.spread else self.originals[which])

    @torch.no_grad()
    def _other_bits(self, wanted: Tensor) -> Tensor:
        """Whether the tensor has other bits here than `wanted`, at the elements that this process holds."""
        flat, indices, _ = self._held()
        own = wanted.to(flat)
        bits = _BITS[flat.element_size()]
        return (flat[indices].view(bits) != own.view(bits)).any()

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
