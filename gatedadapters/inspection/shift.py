"""A picture of how far a base update moved the activations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gatedadapters.reporting.html import INK
from gatedadapters.structure.picture import quiet, save_figure
from gatedadapters.transfer import ActivationShift


def shift_picture(shift: ActivationShift, *, title: str | None = None) -> Figure:
    """A heat map of the relative shift of the output of each point, in per cent. Rows are blocks, columns points.

    White: the block has no such point.

    Args:
        shift: see `activation_shift`.
        title: shown above the picture.
    """
    blocks, columns, cells = shift.grid()
    values = np.full((len(blocks), max(1, len(columns))), np.nan)
    for (block, name), value in cells.items():
        values[blocks.index(block), columns.index(name)] = 100 * value
    size = (max(4.5, 0.42 * len(columns) + 2.0), min(9.0, 0.28 * len(blocks) + 1.9))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="YlOrRd", vmin=0)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7, color=INK)
    every = max(1, len(blocks) // 24)
    axes.set_yticks(range(0, len(blocks), every), [str(b) for b in blocks[::every]], fontsize=7, color=INK)
    axes.tick_params(length=0)
    axes.set_ylabel("block", fontsize=8, color=INK)
    if len(blocks) <= 24:
        peak = float(np.nanmax(values)) if cells else 1.0
        for row, column in np.argwhere(~np.isnan(values)):
            value = values[row, column]
            ink = "white" if value > 0.6 * peak else INK
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=6, color=ink)
    for side in axes.spines.values():
        side.set_visible(False)
    quiet(figure.colorbar(image, ax=axes, shrink=0.8), "relative shift, %")
    attention, feed_forward = shift.mean("attention"), shift.mean("feed_forward")
    axes.set_title(f"mean: attention {attention:.1%}, feed-forward {feed_forward:.1%}", fontsize=8, color=INK)
    figure.suptitle(title or "what the update moved", fontsize=10, fontweight="bold", color=INK)
    return figure


def save_shift_png(shift: ActivationShift, path: str | Path, *, title: str | None = None, dpi: int = 150) -> None:
    """Write `shift_picture(shift)` as a PNG file."""
    save_figure(shift_picture(shift, title=title), path, dpi=dpi)
