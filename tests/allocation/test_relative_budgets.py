"""A budget that is relative to the gain: allocation measures the frontier in its probe."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gatedadapters as ga
from gatedadapters.errors import BudgetError
from gatedadapters.testing.placement_contract import probed

SPACE = ga.SearchSpace.parse(
    {"paths": [{"kind": "lora", "rank": 4, "at": {"sublayers": ["feed_forward"]}}, {"kind": "norm"}]}, where="test"
)


def learnable() -> tuple[nn.Module, list[dict[str, Any]]]:
    """One text, again and again: candidates gain much, also on what is held out."""
    model, batches = probed("llama")
    return model, [batches[0]] * 12


def test_the_smallest_structure_within_the_share_is_allocated_and_the_model_is_as_before() -> None:
    model, batches = learnable()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    placement = ga.place(model, SPACE, batches, frontier=8, within=0.1, learning_rate=3e-2)
    (frontier,) = placement.frontiers
    assert frontier.dense < frontier.base
    structure = ga.allocate(model, SPACE, batches, budget=ga.Budget(within=0.1), learning_rate=3e-2)
    assert structure == placement.structure(ga.Budget(within=0.1))
    assert structure.params == frontier.within(0.1).params < structure.dense_params
    looser = placement.structure(ga.Budget(within=0.5))
    assert looser.params < structure.params
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_points_close_in_on_the_smallest_size_that_is_enough() -> None:
    model, batches = learnable()
    coarse = ga.place(model, SPACE, batches, frontier=3, learning_rate=3e-2).frontiers[0]
    fine = ga.place(model, SPACE, batches, frontier=3, within=0.1, learning_rate=3e-2).frontiers[0]
    assert {p.params for p in coarse.points} < {p.params for p in fine.points}
    assert fine.within(0.1).params <= coarse.within(0.1).params


def test_several_tasks_get_what_the_most_demanding_one_needs() -> None:
    model, batches = learnable()
    hard = [{**batches[0], "labels": batches[0]["labels"].roll(1, 1)}] * 12
    placement = ga.place(model, SPACE, {"a": batches, "b": hard}, frontier=4, within=0.1, learning_rate=3e-2)
    sizes = [frontier.within(0.1).params for frontier in placement.frontiers]
    assert len(sizes) == 2
    assert placement.structure(ga.Budget(within=0.1)).params <= max(sizes)


def test_candidates_that_gain_nothing_are_refused_and_nothing_stays_attached() -> None:
    model, batches = probed("llama")
    with pytest.raises(BudgetError, match="gain nothing"):  # a rate at which nothing is learnt
        ga.allocate(model, SPACE, batches, budget=ga.Budget(within=0.02), learning_rate=1e-30, score="random")
    ga.attach(model, SPACE)


def test_a_placement_without_a_frontier_cannot_tell_the_size() -> None:
    model, batches = learnable()
    placement = ga.place(model, SPACE, batches, score="random")
    with pytest.raises(BudgetError, match="only after a probe"):
        placement.structure(ga.Budget(within=0.02))
