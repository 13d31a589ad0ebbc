"""y + B diag(z) A x as one autograd function, which saves few activations and makes no full-width temporaries."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class LowRank(torch.autograd.Function):
    """target + ((x down^T) * gate) up^T.

    Shapes: x (tokens, in), target (tokens, out), down (r, in), up (out, r), gate None, (g,) or (tokens, g) with g in
    {1, r}. It computes in target's dtype; each gradient has the dtype of its parameter. It saves for backward what it
    multiplied: x, the bottleneck and the parameters, nothing of width `out`. The bottleneck is laid out as (r, tokens):
    matrix products with few rows run several times faster than those with few columns.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, down: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
        """See the class."""
        ctx.dtypes = [None if given is None else given.dtype for given in (x, down, up, gate)]
        x, down, up = x.to(target.dtype), down.to(target.dtype), up.to(target.dtype)
        gate = None if gate is None else gate.to(target.dtype)
        bottleneck = down @ x.t()
        ctx.save_for_backward(x, down, up, bottleneck, gate)
        return torch.addmm(target, _gated(bottleneck, gate).t(), up.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, target, down, up and gate; None if not needed."""
        x, down, up, bottleneck, gate = ctx.saved_tensors
        x_dtype, down_dtype, up_dtype, gate_dtype = ctx.dtypes
        need_x, _, need_down, need_up, need_gate = ctx.needs_input_grad
        grad_x = grad_down = grad_up = grad_gate = None
        if need_up:
            grad_up = (_gated(bottleneck, gate) @ grad).t().to(up_dtype)
        if need_x or need_down or need_gate:
            inner = up.t() @ grad.t()  # (r, tokens): gradient at the gated bottleneck
            if need_gate:
                grad_gate = _gate_gradient(inner, bottleneck, gate, gate_dtype)
            inner = _gated(inner, gate)
            if need_down:
                grad_down = (inner @ x).to(down_dtype)
            if need_x:
                grad_x = (inner.t() @ down).to(x_dtype)
        return grad_x, grad, grad_down, grad_up, grad_gate


_apply: Callable[..., Tensor] = LowRank.apply


def _gated(bottleneck: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return bottleneck
    return bottleneck * (gate[:, None] if gate.dim() == 1 else gate.t())


def _gate_gradient(inner: Tensor, bottleneck: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
    product = (inner.float() * bottleneck.float()) if dtype == torch.float32 else inner * bottleneck
    if gate.dim() == 1:
        total = product.sum(1)
        return (total if gate.shape[0] == total.shape[0] else total.sum(0, keepdim=True)).to(dtype)
    total = product.t()
    return (total if gate.shape[1] == total.shape[1] else total.sum(1, keepdim=True)).to(dtype)


def low_rank(x: Tensor, target: Tensor, down: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
    """Apply `LowRank` to tensors with any leading dimensions; see there for shapes."""
    rows = target.reshape(-1, target.shape[-1])
    with in_its_own_type(target):
        result = _apply(x.reshape(-1, x.shape[-1]), rows, down, up, gate)
    return result.view(target.shape)


def looked_up(ids: Tensor, target: Tensor, down: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
    """The same where x has a single 1: ids (...) says at which of the columns of `down`."""
    rows = target.reshape(-1, target.shape[-1])
    with in_its_own_type(target):
        bottleneck = F.embedding(ids.reshape(-1), down.t())
        added = (bottleneck if gate is None else bottleneck * gate) @ up.t()
    return (rows + added.to(target.dtype)).view(target.shape)


def in_its_own_type(target: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast: what is added to a float32 target must not be rounded to a lower precision."""
    device = target.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
