"""The best rate of each kind by width, as the optimiser's own and divided by the library's factor."""

from __future__ import annotations

from benchmarks.studies.rates.cells import KINDS, RATES, STORE, WIDTHS, Cell


def best_rate(width: int, kind: str, seed: int = 0) -> tuple[float, float] | None:
    """The best rate, by a parabola through the losses around the best of the grid in log rate, and its loss there.

    None where a cell next to it is missing, or where the best lies at the end of the grid.
    """
    found = {}
    for rate in RATES:
        result = STORE.read(Cell(width, kind, rate, seed).name)
        if result is not None and result["loss"] == result["loss"]:
            found[rate] = float(result["loss"])
    if not found:
        return None
    best = min(found, key=lambda rate: found[rate])
    at = RATES.index(best)
    around = [found.get(RATES[i]) for i in (at - 1, at, at + 1) if 0 <= i < len(RATES)]
    if len(around) < 3 or None in around:
        return None
    low, mid, high = (float(value) for value in around if value is not None)
    shift = 0.5 * (low - high) / max(low - 2 * mid + high, 1e-9)
    return best * 2.0 ** max(-0.5, min(0.5, shift)), mid


def tables() -> str:
    """Kind by width."""
    lines = []
    for kind in KINDS:
        row = []
        for width in WIDTHS:
            found = best_rate(width, kind)
            row.append("-" if found is None else f"{found[0]:.2g} ({found[1]:.3f})")
        lines.append("| " + " | ".join([kind, *row]) + " |")
    head = ["kind", *map(str, WIDTHS)]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines])
