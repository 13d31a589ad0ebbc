"""Curves of loss on the domain against loss in general, and what lies between two of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from benchmarks.common.store import Result
from benchmarks.studies.forgetting_frontier.cells import RATES, STORE, Cell

Point = tuple[float, float]
"""What was learned of the domain and what was lost in general, both in nats per token against the untouched model."""
Run = Sequence[Point]
Frontier = Mapping[int, Sequence[Run]]
"""The runs of an arm, at one or several rates, by seed."""
GRID = 200


def trade(losses: Mapping[str, float], start: Mapping[str, float]) -> Point:
    """What was learned and what was lost; general loss is the mean over news and fiction."""
    lost = {kind: losses[kind] - start[kind] for kind in ("domain", "news", "fiction")}
    return -lost["domain"], (lost["news"] + lost["fiction"]) / 2


def run_of(points: Mapping[str, Mapping[str, float]], start: Mapping[str, float]) -> Run:
    """A run as a curve that begins at the untouched model. Where the domain's loss rises again, the curve ends: what
    was learned there could be had for less.
    """
    curve = [(0.0, 0.0)]
    for _, losses in sorted(points.items(), key=lambda item: int(item[0])):
        point = trade(losses, start)
        if point[0] > curve[-1][0]:
            curve.append(point)
    return curve


def lost_at(runs: Sequence[Run], learned: float) -> float:
    """The least that any of these runs loses in general when so much is learned, interpolated; nan if none gets there.

    Args:
        runs: of one arm and one seed.
        learned: in nats.
    """
    found = [
        float(np.interp(learned, [x for x, _ in run], [y for _, y in run])) for run in runs if run[-1][0] >= learned
    ]
    return min(found, default=float("nan"))


def areas(first: Sequence[Run], second: Sequence[Run]) -> tuple[float, float]:
    """The mean losses in general of two arms of one seed, over all that both learn; (nan, nan) if one learns nothing.

    Their difference is the area between the two curves, divided by its width.
    """
    most = min(max(run[-1][0] for run in runs) for runs in (first, second))
    if most <= 0:
        return float("nan"), float("nan")
    grid = most * (np.arange(GRID) + 0.5) / GRID
    means = [float(np.mean([lost_at(runs, x) for x in grid])) for runs in (first, second)]
    return means[0], means[1]


def paired(first: Frontier, second: Frontier, value: Callable[[Sequence[Run], Sequence[Run]], float]) -> list[float]:
    """`value` of every seed that both arms have, without those for which it is nan."""
    found = [value(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    return [number for number in found if not np.isnan(number)]


def frontiers(steps: int, results: Mapping[str, Result] | None = None) -> dict[str, dict[str, dict[int, list[Run]]]]:
    """The stored runs by domain, curve and seed. Runs of seeds that lack one of a curve's rates count too, so that a
    study under way shows something.

    Args:
        steps: of the runs.
        results: default: all that are stored.
    """
    stored = STORE.results() if results is None else results
    starts = {result["start"]: result["points"]["0"] for result in stored.values() if "start" in result}
    found: dict[str, dict[str, dict[int, list[Run]]]] = {}
    for result in stored.values():
        if "cell" not in result:
            continue
        cell = Cell(**result["cell"])
        if cell.steps == steps and cell.domain in starts:
            seeds = found.setdefault(cell.domain, {}).setdefault(cell.curve, {})
            seeds.setdefault(cell.seed, []).append(run_of(result["points"], starts[cell.domain]))
    order = list(RATES)
    return {
        domain: dict(sorted(curves.items(), key=lambda item: (order.index(item[0].split()[0]), item[0])))
        for domain, curves in found.items()
    }
