"""The table, and what became of the claims."""

from __future__ import annotations

from collections.abc import Sequence

from gatedadapters.studies import Curve, Study
from gatedadapters.studies.results import MEAN


def table(study: Study) -> str:
    """Every curve of mean accuracy, and what became of the claims."""
    return f"{study}\n\n{claims(study.curves())}"


def claims(curves: Sequence[Curve]) -> str:
    """What became of the claims, from the curves of mean accuracy."""
    lines = []
    for curve in (c for c in curves if c.task == MEAN and len(c.points) > 1):
        first, best = curve.points[0], max(curve.points, key=lambda point: point.score)
        if curve.factor == "penalty.weight":
            last = curve.points[-1]
            lines.append(
                f"sparsity weight, {curve.side}: best at {best.value:g} ({100 * best.score:.1f} %, {best.params:,.0f} "
                f"parameters), {100 * (last.score - best.score):+.1f} points at {last.value:g} ({last.params:,.0f})"
            )
        else:
            steps = [f"{100 * (p.score - first.score):+.1f} at {float(p.value):.0%}" for p in curve.points[1:]]
            lines.append(f"{curve.factor}, {curve.side}: {', '.join(steps)} (points against {100 * first.score:.1f} %)")
    return "\n".join(lines)
