"""A picture of frontiers: size against held-out loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from gatedadapters.reporting.html import INK
from gatedadapters.structure.frontier import Frontier
from gatedadapters.structure.picture import save_figure

_LINE, _FAINT, _CHOSEN = "#1f5fa6", "#8b949c", "#b2182b"


def frontier_picture(
    frontiers: Frontier | Mapping[str, Frontier], *, within: float | None = None, title: str | None = None
) -> Figure:
    """Parameters, on a logarithmic axis, against held-out loss. Dashed: the backbone; dotted: all candidates.

    Args:
        frontiers: one, or one for each task by name, each in a panel of its own.
        within: mark the smallest point of each that keeps `1 - within` of the gain, if there is a gain.
        title: shown above the panels.
    """
    named = {"": frontiers} if isinstance(frontiers, Frontier) else dict(frontiers)
    figure = Figure(figsize=(max(5.0, 4.2 * len(named)), 3.4), layout="constrained")
    for axes, (name, frontier) in zip(figure.subplots(1, len(named), squeeze=False)[0], named.items(), strict=True):
        sizes, losses = [p.params for p in frontier.points], [p.loss for p in frontier.points]
        axes.axhline(frontier.base, color=_FAINT, linewidth=0.9, linestyle="--")
        axes.axhline(frontier.dense, color=_FAINT, linewidth=0.9, linestyle=":")
        axes.plot(sizes, losses, color=_LINE, marker="o", markersize=4, linewidth=1.4)
        axes.annotate(
            "without adapters", (1, frontier.base), xycoords=("axes fraction", "data"), xytext=(-3, -3),
            textcoords="offset points", ha="right", va="top", fontsize=7, color=_FAINT,
        )  # fmt: skip
        if within is not None and frontier.base > frontier.dense:
            point = frontier.within(within)
            axes.plot([point.params], [point.loss], color=_CHOSEN, marker="o", markersize=8, fillstyle="none")
            axes.annotate(
                f"{point.params:,} parameters:\n{frontier.share(point):.0%} of the gain", (0.97, 0.66),
                xycoords="axes fraction", ha="right", va="top", fontsize=7, color=_CHOSEN,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(_apart(sizes))
        axes.margins(x=0.12, y=0.15)
        axes.tick_params(labelsize=7, colors=INK, length=2)
        axes.set_xlabel("adapter parameters", fontsize=8, color=INK)
        axes.set_ylabel("held-out loss", fontsize=8, color=INK)
        axes.set_title(name, fontsize=9, color=INK)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.suptitle(title or "size against held-out loss", color=INK, fontsize=11, fontweight="bold")
    return figure


def save_frontier_png(
    frontiers: Frontier | Mapping[str, Frontier],
    path: str | Path,
    *,
    within: float | None = None,
    title: str | None = None,
    dpi: int = 150,
) -> None:
    """Write `frontier_picture(frontiers)` as a PNG file."""
    save_figure(frontier_picture(frontiers, within=within, title=title), path, dpi=dpi)


def _apart(sizes: Sequence[int]) -> list[int]:
    """Those of ascending sizes whose labels do not run into each other on a logarithmic axis."""
    room = 0.12 * math.log(max(sizes[-1] / sizes[0], 2.0))
    found = [sizes[0]]
    for size in sizes[1:]:
        if math.log(size / found[-1]) >= room:
            found.append(size)
    return found


def _short(size: float, position: int | None = None) -> str:
    """A number of parameters in three digits: 57.6k."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{size / unit:.3g}{letter}"
    return f"{size:.0f}"
