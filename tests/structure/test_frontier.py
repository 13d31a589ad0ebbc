"""Frontiers: sizes rise, the smallest point that keeps enough is found, and nothing is changed by looking."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

import gatedadapters as ga
from gatedadapters.errors import AttachError, BudgetError
from gatedadapters.structure.frontier import Frontier, FrontierPoint
from gatedadapters.testing.placement_contract import probed

SPACE = ga.SearchSpace.parse(
    {"paths": [{"kind": "lora", "rank": 4, "at": {"sublayers": ["feed_forward"]}}, {"kind": "norm"}]}, where="test"
)


def made_up(*points: tuple[int, float], base: float = 3.0) -> Frontier:
    return Frontier(
        tuple(FrontierPoint(cast(ga.Structure, SimpleNamespace(params=size)), loss) for size, loss in points), base
    )


def attached() -> tuple[nn.Module, ga.Adapters, list[dict[str, Any]]]:
    """Candidates that have learnt something; each has moved by another amount."""
    model, batches = probed("llama")
    adapters = ga.attach(model, SPACE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.weight_parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model, adapters, batches


def test_within_is_the_smallest_point_that_keeps_the_share_of_the_gain() -> None:
    frontier = made_up((10, 2.8), (20, 2.12), (40, 2.02), (80, 2.0))
    assert [frontier.within(share).params for share in (0.5, 0.2, 0.1, 0.02, 0.001)] == [20, 20, 40, 40, 80]
    bumpy = made_up((10, 2.01), (20, 2.5), (40, 2.0))
    assert bumpy.within(0.05).params == 10


@pytest.mark.parametrize("dense", [3.0, 3.5, math.nan])
def test_candidates_that_gain_nothing_have_no_share_to_keep(dense: float) -> None:
    with pytest.raises(BudgetError, match="gain nothing"):
        made_up((10, 2.9), (80, dense)).within(0.02)


def test_the_table_says_what_share_of_the_gain_each_size_keeps() -> None:
    lines = str(made_up((1_000, 2.5), (2_000, 2.0))).splitlines()
    assert [line.split() for line in lines[2:]] == [
        ["0", "3.0000", "0%"],
        ["1,000", "2.5000", "50%"],
        ["2,000", "2.0000", "100%"],
    ]


def test_sizes_rise_to_all_candidates_and_each_loss_is_that_of_its_structure() -> None:
    model, adapters, batches = attached()
    frontier = adapters.frontier(batches[:2], points=5)
    sizes = [point.params for point in frontier.points]
    assert sizes == sorted(set(sizes))
    assert frontier.points[-1].structure.params == frontier.points[-1].structure.dense_params
    for point in (frontier.points[1], frontier.points[-1]):
        twin, own, _ = attached()  # without the units that the structure drops; all gates of the start are 1
        kept = {path.key: path.kept for path in point.structure.paths}
        for key, path in own.typed_paths():
            path.scale_units(torch.tensor([float(unit in kept.get(key, ())) for unit in range(path.units)]))
        twin.eval()
        with torch.no_grad():
            losses = [float(twin(**batch).loss) for batch in batches[:2]]
        assert point.loss == pytest.approx(sum(losses) / 2, abs=1e-6)
    with adapters.disabled(), torch.no_grad():
        losses = [float(model.eval()(**batch).loss) for batch in batches[:2]]
    assert frontier.base == pytest.approx(sum(losses) / 2, abs=1e-6)


def test_looking_changes_nothing() -> None:
    model, adapters, batches = attached()
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    adapters.frontier(batches[:1], points=3)
    assert model.training
    assert adapters.bank is not None
    assert adapters.bank.log_alpha.requires_grad
    assert not adapters.bank.frozen
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_loss_of_ones_own_judges() -> None:
    _, adapters, _ = attached()
    seen: list[nn.Module] = []
    frontier = adapters.frontier([], points=2, loss=lambda model: float(len(seen) or seen.append(model) or 0))
    assert seen == [adapters.model]
    assert frontier.base == 1.0


def test_what_cannot_be_measured_is_refused() -> None:
    _, adapters, batches = attached()
    with pytest.raises(BudgetError, match="two ends"):
        adapters.frontier(batches, points=1)
    with pytest.raises(BudgetError, match="nothing to measure"):
        adapters.frontier([])
    adapters.compact(adapters.discretize(ga.Budget(fraction=0.2)))
    with pytest.raises(AttachError, match="compact"):
        adapters.frontier(batches)
