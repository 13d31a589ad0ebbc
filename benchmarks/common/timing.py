"""Timing of several sides that take turns, so that a busy machine slows all of them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping

CLOCKS = ("cpu", "wall")
PRECISIONS = {"fp32": "fp32", "bf16": "bf16 autocast"}  # as tables show them
Times = dict[str, dict[str, list[float]]]  # seconds of every round by clock and side


def in_turns(sides: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: int) -> Times:
    """Call every side once a round, in an order drawn anew each round.

    Args:
        sides: what is timed, by name.
        rounds: how many are counted.
        warm_up: rounds before them, which are not counted.

    Returns:
        CPU seconds of the process and wall seconds of each round.
    """
    times: Times = {clock: {side: [] for side in sides} for clock in CLOCKS}
    order = random.Random(0)
    for number in range(warm_up + rounds):
        for side in order.sample(list(sides), len(sides)):
            wall, cpu = time.perf_counter(), time.process_time()
            sides[side]()
            taken = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
            if number >= warm_up:
                for clock, seconds in taken.items():
                    times[clock][side].append(seconds)
    return times


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Median over rounds of every side, on one clock."""
    return {side: statistics.median(values) for side, values in seconds.items()}


def ratio(seconds: Mapping[str, list[float]], a: str, b: str) -> float:
    """Median over rounds of the ratio of two sides within a round, on one clock."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
