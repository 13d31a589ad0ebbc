"""What LoRA does beyond the contract."""

from __future__ import annotations

import pytest
import torch

from gatedadapters.paths.lora import LoRA, LoRAOptions
from gatedadapters.paths.site import Point, Site
from gatedadapters.testing.helpers import awaken


def lora(width_in: int, width_out: int, rank: int) -> LoRA:
    site = Site(
        Point("m", "input"), Point("m", "output"), width_in, width_out, block="b", block_index=0, sublayer="", role=""
    )
    path = LoRA(site, LoRAOptions(rank=rank), torch.Generator().manual_seed(0))
    awaken(path)
    return path


@pytest.mark.parametrize(("width_in", "width_out", "rank"), [(12, 20, 8), (12, 3, 8), (3, 12, 8)])
@pytest.mark.parametrize("kept", [1, 3, 6])
def test_condensing_is_the_best_approximation_of_its_rank(width_in: int, width_out: int, rank: int, kept: int) -> None:
    path = lora(width_in, width_out, rank)
    gate = torch.rand(rank)
    full = (path.up * gate) @ path.down
    u, s, vh = torch.linalg.svd(full.detach(), full_matrices=False)
    best = (u[:, :kept] * s[:kept]) @ vh[:kept]
    keep = torch.randperm(rank)[:kept]
    path.condense(keep, gate)
    torch.testing.assert_close((path.up @ path.down).detach(), best, rtol=1e-4, atol=1e-5)
    dropped = sorted(set(range(rank)) - set(keep.tolist()))
    assert not path.up[:, dropped].any()


def test_a_rank_that_held_nothing_can_still_learn_after_condensing() -> None:
    path = lora(12, 20, 4)
    with torch.no_grad():
        path.up.zero_()
    path.condense(torch.arange(4), torch.ones(4))
    path(torch.randn(5, 12), torch.zeros(5, 20), None).sum().backward()
    assert path.up.grad is not None
    assert (path.up.grad != 0).any(0).all()


def test_nothing_of_full_width_is_saved_for_backward() -> None:
    path = lora(64, 640, 4)
    tapped = torch.randn(100, 64, requires_grad=True)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        path(tapped, torch.randn(100, 640, requires_grad=True), torch.rand(4, requires_grad=True)).sum()
    assert max(sizes) == tapped.numel()
    assert sum(sizes) < 100 * 640
