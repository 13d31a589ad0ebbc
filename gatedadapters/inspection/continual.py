"""Pictures of a stream of tasks: the matrix of scores, and the cores of the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gatedadapters.continual import Core, StreamResult
from gatedadapters.inspection.matrix import matrix_picture
from gatedadapters.reporting.html import INK
from gatedadapters.structure.picture import quiet, save_figure


def stream_picture(result: StreamResult, *, title: str | None = None) -> Figure:
    """The matrix R as a heat map: rows are stages, the first of them the untrained model; columns are tasks."""
    scores = [result.baseline.scores, *result.matrix]
    rows = ["untrained", *(stage.task for stage in result.stages)]
    return matrix_picture(result.tasks, scores, rows=rows, title=title or result.strategy)


def save_stream_png(result: StreamResult, path: str | Path, *, title: str | None = None, dpi: int = 150) -> None:
    """Write `stream_picture(result)` as a PNG file."""
    save_figure(stream_picture(result, title=title), path, dpi=dpi)


def core_picture(cores: Sequence[tuple[str, Core]], *, title: str = "what each task may move") -> Figure:
    """One panel for each task, with blocks as rows and roles as columns.

    Colours show the share of the elements that are selected, in per cent. Numbers count tensors. White: no such tensor.
    The row "out" holds the tensors outside the blocks. Heads are not counted.
    """
    places = sorted({place for _, core in cores for place in core.cells()}, key=lambda p: (p[0] is None, p[0] or 0))
    blocks = list(dict.fromkeys(block for block, _ in places))
    roles = list(dict.fromkeys(info.role for _, core in cores for info in core.infos.values()))
    width, height = 0.42 * len(roles) + 0.9, 0.28 * len(blocks) + 1.6
    across = max(1, min(len(cores), round(11 / width)))
    down = -(-len(cores) // across)
    figure = Figure(figsize=(max(4.5, across * width + 0.8), down * height + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False)
    for axis in axes.flat[len(cores) :]:
        axis.set_axis_off()
    for axis, (name, core) in zip(axes.flat, cores, strict=False):
        values = np.full((len(blocks), len(roles)), np.nan)
        for (block, role), (tensors, _, chosen, size) in core.cells().items():
            row, column = blocks.index(block), roles.index(role)
            values[row, column] = 100 * chosen / size
            if tensors:
                ink = "white" if chosen > 0.6 * size else INK
                axis.text(column, row, str(tensors), ha="center", va="center", fontsize=6, color=ink)
        image = axis.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="YlGnBu", vmin=0, vmax=100)
        axis.set_xticks(range(len(roles)), roles, rotation=90, fontsize=7, color=INK)
        labels = ["out" if block is None else str(block) for block in blocks]
        every = max(1, len(blocks) // 24)
        axis.set_yticks(range(0, len(blocks), every), labels[::every], fontsize=7, color=INK)
        axis.tick_params(length=0)
        axis.set_title(f"{name}: {core.tensor_share:.0%} of tensors, {core.element_share:.2%} of elements", fontsize=8)
        for side in axis.spines.values():
            side.set_visible(False)
    quiet(figure.colorbar(image, ax=axes, shrink=0.8), "elements selected, %")
    figure.suptitle(title, fontsize=10, fontweight="bold", color=INK)
    return figure


def save_core_png(cores: Sequence[tuple[str, Core]], path: str | Path, *, dpi: int = 150) -> None:
    """Write `core_picture(cores)` as a PNG file."""
    save_figure(core_picture(cores), path, dpi=dpi)
