"""Random zeros in a tensor, of which nothing is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 2**16  # elements whose mask is made at once, so that it stays in the cache; a multiple of 4


def masked(inner: Tensor, share: float, *, rescale: bool = False) -> Tensor:
    """`inner` with each element set to 0 with probability `share`, drawn from the device's default generator.

    Where autograd allows it, `inner` itself is changed: half of what masking costs is the memory of a second tensor.

    Args:
        inner: any shape and dtype.
        share: in [0, 1).
        rescale: divide what stays by 1 - share.
    """
    scale = 1 / (1 - share) if rescale else 1.0
    if inner.device.type == "cpu" and inner.numel() and not torch.compiler.is_compiling():
        key, threshold = _drawn(share)
        return _apply(inner, key, threshold, scale, _may_change(inner))
    keep = torch.empty_like(inner, requires_grad=False).bernoulli_(1 - share).mul_(scale)
    return inner.mul_(keep) if _may_change(inner) else inner * keep


class RandomMask(torch.autograd.Function):
    """The mask on the CPU. The backward pass draws it anew from its key: to write a number for each element into fresh
    memory takes longer than to draw it.
    """

    @staticmethod
    def forward(ctx: Any, inner: Tensor, key: int, threshold: int, scale: float, in_place: bool) -> Tensor:
        """The masked tensor; `inner` itself if it may be changed."""
        ctx.drawn = key, threshold, scale
        if in_place:
            ctx.mark_dirty(inner)
        result = _multiply(inner, key, threshold, scale, out=inner if in_place else None)
        return inner if in_place else result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient, masked alike."""
        return _multiply(grad, *ctx.drawn), None, None, None, None


_apply: Callable[..., Tensor] = RandomMask.apply


def _may_change(inner: Tensor) -> bool:
    """Whether `inner` was computed just now, by a function whose backward pass does not read its output."""
    if torch.compiler.is_compiling() or inner._base is not None or not inner.is_contiguous():
        return False
    return type(inner.grad_fn).__name__ in ("GeluBackward0", "MulBackward0", "SiluBackward0")


def _drawn(share: float) -> tuple[int, int]:
    """A key of random bits, and the number below which 16 of them mean 0; both from torch's default generator.

    On the CPU a Bernoulli draw per element costs as much as the map that reads it. So each element compares 16 bits of
    a faster generator with a threshold that is rounded to 16 bits at random, once a call: the probability is exactly
    `share`.
    """
    key = torch.empty((), dtype=torch.int64, device="cpu").random_()
    threshold = (2**16 * share + torch.rand((), dtype=torch.float64)).floor().clamp(max=2**16 - 1)
    return int(key), int(threshold)


def _multiply(given: Tensor, key: int, threshold: int, scale: float, *, out: Tensor | None = None) -> Tensor:
    """`given` with zeros where the bits say so, block by block; into `out`, which may be `given`."""
    flat = given.contiguous().view(-1)
    result = torch.empty_like(flat) if out is None else out.view(-1)
    keep = flat.new_empty(min(BLOCK, len(flat)))
    for start, bits in _bits(len(flat), key):
        part = torch.ge(bits, threshold - 2**15, out=keep[: len(bits)])  # a product of floats is quicker than a fill
        if scale != 1:
            part.mul_(scale)
        torch.mul(flat[start : start + len(bits)], part, out=result[start : start + len(bits)])
    return result.view(given.shape)


def _bits(count: int, key: int) -> Iterator[tuple[int, Tensor]]:
    """Where each block begins, and 16 random bits for each of its elements, as int16."""
    generator = np.random.SFC64(key)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        yield start, torch.from_numpy(generator.random_raw(-(-size // 4)).view(np.int16))[:size]
