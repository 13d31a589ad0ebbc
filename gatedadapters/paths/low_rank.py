"""y + B diag(z) A x as one autograd function: few saved activations, no full-width temporaries."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


class LowRank(torch.autograd.Function):
    """target + ((x down^T) * gate) up^T.

    Shapes: x (tokens, in), target (tokens, out), down (r, in), up (out, r), gate None, (g,) or (tokens, g) with g in
    {1, r}. Computes in target's dtype; gradients come back in each parameter's own. Saved for backward: x and the
    bottleneck (r, tokens), nothing of width `out`. Skinny products are laid out (r, tokens): with r rows leading they
    run several times faster than with r columns trailing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, down: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
        """See the class."""
        x_, down_, up_ = x.to(target.dtype), down.to(target.dtype), up.to(target.dtype)
        bottleneck = down_ @ x_.t()
        ctx.save_for_backward(x_, down, up, bottleneck, gate)
        ctx.x_dtype = x.dtype
        return torch.addmm(target, _gated(bottleneck, gate).t(), up_.t())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, target, down, up and gate, those that are needed."""
        x, down, up, bottleneck, gate = ctx.saved_tensors
        need_x, _, need_down, need_up, need_gate = ctx.needs_input_grad
        grad_x = grad_down = grad_up = grad_gate = None
        if need_up:
            grad_up = (_gated(bottleneck, gate) @ grad).t().to(up.dtype)
        if need_x or need_down or need_gate:
            inner = up.to(grad.dtype).t() @ grad.t()  # (r, tokens): gradient at the gated bottleneck
            if need_gate:
                grad_gate = _gate_gradient(inner, bottleneck, gate)
            inner = _gated(inner, gate)
            if need_down:
                grad_down = (inner @ x).to(down.dtype)
            if need_x:
                grad_x = (inner.t() @ down.to(grad.dtype)).to(ctx.x_dtype)
        return grad_x, grad, grad_down, grad_up, grad_gate


_apply: Callable[..., Tensor] = LowRank.apply


def _gated(bottleneck: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return bottleneck
    gate = gate.to(bottleneck.dtype)
    return bottleneck * (gate[:, None] if gate.dim() == 1 else gate.t())


def _gate_gradient(inner: Tensor, bottleneck: Tensor, gate: Tensor) -> Tensor:
    product = (inner.float() * bottleneck.float()) if gate.dtype == torch.float32 else inner * bottleneck
    if gate.dim() == 1:
        total = product.sum(1)
        return (total if gate.shape[0] == total.shape[0] else total.sum(0, keepdim=True)).to(gate.dtype)
    total = product.t()
    return (total if gate.shape[1] == total.shape[1] else total.sum(1, keepdim=True)).to(gate.dtype)


def low_rank(x: Tensor, target: Tensor, down: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
    """`LowRank` over any leading dimensions; see there for shapes."""
    rows = target.reshape(-1, target.shape[-1])
    with in_its_own_type(target):
        result = _apply(x.reshape(-1, x.shape[-1]), rows, down, up, gate)
    return result.view(target.shape)


def in_its_own_type(target: Tensor) -> AbstractContextManager[Any]:
    """Autocast off, so that what is added to `target` has its type: a float32 target must not be rounded."""
    device = target.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
