"""The scores that are judged: those of the library by their kind, and further ones that are tried here.

To judge a score, add a function to `OWN` that makes an object with `value(structure) -> float`, and run

    python -m benchmarks placement score --scores NAME
"""

from __future__ import annotations

from collections.abc import Callable

import gatedadapters as ga
from benchmarks.studies.placement.judging import Predicts
from benchmarks.studies.placement.regimes import Regime
from gatedadapters.allocation import place, score_kinds

OWN: dict[str, Callable[[Regime, int], Predicts]] = {}
"""Scores that are not in the library, by name: of a regime and a seed. The regime's model must be left as it was."""


def names() -> list[str]:
    """All scores."""
    return [*score_kinds(), *OWN]


def placement(name: str, regime: Regime, seed: int) -> Predicts:
    """What a score finds in a regime."""
    if name in OWN:
        return OWN[name](regime, seed)
    problem = regime.problem
    problem.reset(seed)
    return place(
        problem.model,
        regime.search_space,
        problem.batches(seed, regime.batch),
        budget=ga.Budget(params=regime.size),
        score=name,
        loss=problem.score_loss,
        heads=problem.heads,
        seed=seed,
        progress=False,
    )
