"""y + S x for a sparse matrix S as one autograd function, which keeps the inputs alone for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class SparseProduct(torch.autograd.Function):
    """target + x S^T; S has `values` in `rows` and `columns`, and zeros elsewhere.

    Shapes: x (tokens, in), target (tokens, out), values (k,) or (tokens, k), rows and columns (k,). The backward pass
    gathers x anew: autograd would keep a number for each token and element, which takes longer to write than to
    compute. Everything is computed in at least single precision, because gathering and adding up half-precision numbers
    takes longer and rounds every sum; each gradient has the dtype of what it belongs to.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """See the class."""
        ctx.save_for_backward(x, values, rows, columns)
        ctx.wide = torch.promote_types(target.dtype, torch.float32)
        added = x.to(ctx.wide).index_select(1, columns) * values.to(ctx.wide)
        return target.to(ctx.wide).index_add(1, rows, added).to(target.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, target and values; None if not needed."""
        x, values, rows, columns = ctx.saved_tensors
        grad_x = grad_values = None
        written = grad.to(ctx.wide).index_select(1, rows)
        if ctx.needs_input_grad[2]:
            products = written * x.to(ctx.wide).index_select(1, columns)
            grad_values = (products if values.dim() == 2 else products.sum(0)).to(values.dtype)
        if ctx.needs_input_grad[0]:
            zeros = written.new_zeros(x.shape)
            grad_x = zeros.index_add_(1, columns, written * values.to(ctx.wide)).to(x.dtype)
        return grad_x, grad, grad_values, None, None


_apply: Callable[..., Tensor] = SparseProduct.apply


def sparse_product(x: Tensor, target: Tensor, values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply `SparseProduct` to inputs and targets with any leading dimensions; see there for shapes."""
    flat = target.reshape(-1, target.shape[-1])
    return _apply(x.reshape(-1, x.shape[-1]), flat, values, rows, columns).view(target.shape)
