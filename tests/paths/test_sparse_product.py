"""The product with a few single elements, against a dense product and numerical gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gatedadapters.paths.sparse_product import sparse_product

TOKENS, WIDTH_IN, WIDTH_OUT, COUNT = 5, 6, 7, 11


def places() -> tuple[Tensor, Tensor]:
    """Rows and columns; some rows have several elements and some none."""
    positions = torch.randperm(WIDTH_IN * WIDTH_OUT)[:COUNT]
    return positions // WIDTH_IN, positions % WIDTH_IN


def dense(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return torch.zeros(WIDTH_OUT, WIDTH_IN, dtype=values.dtype).index_put((rows, columns), values)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("lead", [(TOKENS,), (2, TOKENS)])
def test_it_is_the_dense_product_and_so_are_its_gradients(lead: tuple[int, ...]) -> None:
    x, target, values = draw(*lead, WIDTH_IN), draw(*lead, WIDTH_OUT), draw(COUNT)
    place = places()
    ours = sparse_product(x, target, values, *place)
    theirs = target + F.linear(x, dense(values, *place))
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for own, other in zip(
        torch.autograd.grad(ours, (x, target, values), weight),
        torch.autograd.grad(theirs, (x, target, values), weight),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("shape", [(COUNT,), (TOKENS, COUNT)], ids=["one for all", "one for each token"])
def test_gradients_are_the_numerical_ones(shape: tuple[int, ...]) -> None:
    place = places()
    inputs = (draw(TOKENS, WIDTH_IN), draw(TOKENS, WIDTH_OUT), draw(*shape))
    assert torch.autograd.gradcheck(lambda *given: sparse_product(*given, *place), inputs)


def test_half_precision_is_rounded_once_and_gradients_of_values_not_at_all() -> None:
    place = places()
    half = [draw(300, WIDTH_IN, dtype=torch.bfloat16), draw(300, WIDTH_OUT, dtype=torch.bfloat16)]
    values = draw(COUNT, dtype=torch.float32)
    exact = [given.detach().double().requires_grad_() for given in (*half, values)]
    ours, theirs = sparse_product(*half, values, *place), sparse_product(*exact, *place)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-6)
    ours.sum().backward()
    theirs.sum().backward()
    assert values.grad is not None
    assert exact[2].grad is not None
    torch.testing.assert_close(values.grad.double(), exact[2].grad, rtol=1e-5, atol=1e-5)


def test_only_the_inputs_are_kept_for_the_backward_pass() -> None:
    x, target, values = draw(100, WIDTH_IN), draw(100, WIDTH_OUT), draw(COUNT)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        sparse_product(x, target, values, *places())
    assert sum(sizes) == x.numel() + 3 * COUNT
