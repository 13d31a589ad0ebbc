"""A picture of the scores of a continual run, stage by task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from gatedadapters.errors import DataError
from gatedadapters.reporting.html import INK
from gatedadapters.structure.picture import COLOURS, quiet


def matrix_picture(
    names: Sequence[str], values: ArrayLike, *, rows: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """The matrix R of a continual run as a heat map: row t, column i is the score on task i after training on task t.

    Args:
        names: names of the tasks, in the order of training.
        values: (rows, tasks). nan, for a score that was not measured, stays white.
        rows: names of the rows; default: the tasks.
        title: shown above the picture.

    Raises:
        DataError: `values` has another shape.
    """
    found = np.asarray(values, dtype=float)
    stages = names if rows is None else rows
    if found.shape != (len(stages), len(names)) or not found.size:
        raise DataError(
            "this is no matrix of tasks by tasks",
            expected=f"shape ({len(stages)}, {len(names)}), at least (1, 1)",
            got=str(found.shape),
            where="matrix",
            fix="give one row and one column for each name",
        )
    width, height = (max(3.0, 0.55 * count + 1.6) for count in (len(names), len(stages)))
    figure = Figure(figsize=(width + 0.6, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(found), cmap=COLOURS)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=7, color=INK)
    axes.set_yticks(range(len(stages)), stages, fontsize=7, color=INK)
    axes.set_xlabel("score on", fontsize=8, color=INK)
    axes.set_ylabel("after training on", fontsize=8, color=INK)
    axes.tick_params(length=0)
    for row, column in np.argwhere(~np.isnan(found)):
        ink = "white" if float(np.asarray(image.norm(found[row, column]))) > 0.4 else INK
        axes.text(column, row, f"{found[row, column]:.3g}", ha="center", va="center", fontsize=7, color=ink)
    for spine in axes.spines.values():
        spine.set_visible(False)
    quiet(figure.colorbar(image, ax=axes, shrink=0.8))
    if title:
        figure.suptitle(title, fontsize=10, fontweight="bold", color=INK)
    return figure
