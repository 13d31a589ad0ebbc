"""How numbers of several seeds are shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from gatedadapters.reporting.intervals import Interval


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % t interval; nan where there are too few values for one of them."""
    data = list(values)
    if not data:
        return math.nan, math.nan
    found = Interval.of(data)
    return found.mean, math.nan if found.half is None else found.half


def shown(values: Iterable[float], *, times: float = 100, signed: bool = False) -> str:
    """Mean and 95 % interval as text; the mean alone of one value, nothing of none.

    Args:
        values: shares.
        times: 100 shows points with one decimal; any other factor three decimals.
        signed: for differences.
    """
    middle, half = interval(values)
    if math.isnan(middle):
        return ""
    digits = 1 if times == 100 else 3
    text = f"{times * middle:{'+' if signed else ''}.{digits}f}"
    return text if math.isnan(half) else f"{text} ± {times * half:.{digits}f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str | None]]) -> str:
    """A Markdown table; None where a column does not apply to a row."""
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += ["|" + "".join(" |" if cell is None else f" {cell} |" for cell in row) for row in rows]
    return "\n".join(lines)
