"""The EWC penalty against its closed form."""

from __future__ import annotations

import pytest
import torch

import gatedadapters as ga
from gatedadapters.errors import MaskError
from gatedadapters.testing import tiny


def test_the_penalty_and_its_gradient_are_those_of_the_equation() -> None:
    model, _ = tiny("bert")
    scores = ga.score(model, kind="random")
    penalty = ga.ElasticPenalty(model, scores, weight=3.0)
    assert float(penalty().detach()) == 0.0
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    value = penalty()
    value.backward()
    ways = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    wanted = 1.5 * sum((scores[name] * way**2).double().sum() for name, way in ways.items())
    torch.testing.assert_close(value.detach().double(), wanted, rtol=1e-5, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 3.0 * scores[name] * ways[name])


def test_the_penalty_follows_the_model_to_the_device_that_a_trainer_moves_it_to() -> None:
    """It is built before; "meta" stands in for a GPU."""
    model, _ = tiny("bert")
    penalty = ga.ElasticPenalty(model, ga.score(model, kind="random"), weight=3.0)
    model.to("meta")
    assert penalty().device.type == "meta"


def test_bad_requests_are_refused() -> None:
    scores = ga.score(tiny("bert")[0], kind="random")
    with pytest.raises(MaskError, match="another backbone"):
        ga.ElasticPenalty(tiny("bert", seed=1)[0], scores, weight=1.0)
    with pytest.raises(MaskError, match="above 0"):
        ga.ElasticPenalty(tiny("bert")[0], scores, weight=0.0)
