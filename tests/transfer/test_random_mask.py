"""Random zeros over several blocks: their share, their gradient, and what is kept."""

from __future__ import annotations

import pytest
import torch

from gatedadapters.transfer.random_mask import BLOCK, masked

COUNT = 2 * BLOCK + 5  # not a multiple of 4 either


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_zero_has_no_gradient_and_the_rest_is_multiplied(
    dtype: torch.dtype, in_place: bool, rescale: bool
) -> None:
    given = torch.ones(COUNT, dtype=dtype, requires_grad=True)
    inner = given * 2 if in_place else given
    result = masked(inner, 0.2, rescale=rescale)
    assert (result is inner) == in_place
    stays = torch.tensor(2.0 if in_place else 1.0, dtype=dtype) * torch.tensor(1.25 if rescale else 1.0, dtype=dtype)
    assert set(result.tolist()) == {0.0, stays.item()}
    assert abs((result == 0).double().mean() - 0.2) < 5 * (0.2 * 0.8 / COUNT) ** 0.5
    result.sum().backward()
    assert given.grad is not None
    assert torch.equal(given.grad, result.detach())


def test_blocks_differ_and_so_do_calls() -> None:
    first, second = (masked(torch.ones(2 * BLOCK), 0.5) for _ in range(2))
    assert not torch.equal(first[:BLOCK], first[BLOCK:])
    assert not torch.equal(first, second)


def test_nothing_is_kept_for_the_backward_pass() -> None:
    inner = torch.randn(100, 7, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        masked(inner, 0.1)
    assert kept == []


def test_a_tensor_that_is_not_contiguous_keeps_its_shape_and_its_gradient() -> None:
    inner = torch.randn(6, 10, requires_grad=True)
    result = masked(inner.t(), 0.5)
    assert result.shape == (10, 6)
    (grad,) = torch.autograd.grad(result.sum(), inner)
    assert torch.equal(grad == 0, result.t() == 0)
