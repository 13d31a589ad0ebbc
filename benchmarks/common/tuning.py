"""How an arm's learning rate is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from benchmarks.common.store import Result

CellT = TypeVar("CellT")


def best(
    cells: Sequence[CellT], result_of: Callable[[CellT], Result | None], score: Callable[[Result], float]
) -> CellT | None:
    """The cell with the highest validation score, the first of equals; a single cell needs no score.

    Args:
        cells: one for each value that is tried.
        result_of: reads a cell's result (None where it is missing), or computes it.
        score: of a result.

    Returns:
        The cell, or None where a result is missing: a choice among some of them might change later.
    """
    if len(cells) == 1:
        return cells[0]
    results = [result_of(cell) for cell in cells]
    scores = [score(result) for result in results if result is not None]
    return cells[scores.index(max(scores))] if len(scores) == len(cells) else None
