"""A stream of tasks as pictures: the matrix of scores, and where the cores lie."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from gatedadapters.continual import Core, StreamResult

_INK = "#22303c"


def matrix_picture(result: StreamResult, *, title: str | None = None) -> Figure:
    """R as a heat map: rows are stages (the first: untrained), columns tasks; bold is the task just trained."""
    scores = [result.baseline.scores, *result.matrix]
    rows = ["untrained", *(f"after {stage.task}" for stage in result.stages)]
    return _heat_map(scores, rows, list(result.tasks), title or result.strategy)


def save_matrix_png(result: StreamResult, path: str | Path, *, title: str | None = None, dpi: int = 150) -> None:
    """Write `matrix_picture(result)` as a PNG file."""
    _save(matrix_picture(result, title=title), path, dpi)


def core_picture(cores: Sequence[tuple[str, Core]], *, title: str = "what each task may move") -> Figure:
    """One panel a task, blocks by role: the share of the elements selected, in per cent; the number counts tensors.

    White: there is no such tensor. The row "out" is what lies outside the blocks. Heads are not counted.
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
                ink = "white" if chosen > 0.6 * size else _INK
                axis.text(column, row, str(tensors), ha="center", va="center", fontsize=6, color=ink)
        image = axis.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="YlGnBu", vmin=0, vmax=100)
        axis.set_xticks(range(len(roles)), roles, rotation=90, fontsize=7, color=_INK)
        labels = ["out" if block is None else str(block) for block in blocks]
        every = max(1, len(blocks) // 24)
        axis.set_yticks(range(0, len(blocks), every), labels[::every], fontsize=7, color=_INK)
        axis.tick_params(length=0)
        axis.set_title(f"{name}: {core.tensor_share:.0%} of tensors, {core.element_share:.2%} of elements", fontsize=8)
        for side in axis.spines.values():
            side.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("elements selected, %", fontsize=7, color=_INK)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=10, fontweight="bold", color=_INK)
    return figure


def save_core_png(cores: Sequence[tuple[str, Core]], path: str | Path, *, dpi: int = 150) -> None:
    """Write `core_picture(cores)` as a PNG file."""
    _save(core_picture(cores), path, dpi)


def _heat_map(scores: Sequence[Sequence[float]], rows: list[str], columns: list[str], title: str) -> Figure:
    values = np.asarray(scores, dtype=float)
    size = (max(4.5, 0.75 * len(columns) + 2.4), 0.38 * len(rows) + 1.7)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    for row, column in np.ndindex(values.shape):
        ink = "white" if values[row, column] < 0.6 else _INK
        trained = len(rows) > 2 and row == column + 1
        weight = "bold" if trained else "normal"
        shown = f"{values[row, column]:.2f}"
        axes.text(column, row, shown, ha="center", va="center", fontsize=7, color=ink, fontweight=weight)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=7, color=_INK)
    axes.set_yticks(range(len(rows)), rows, fontsize=7, color=_INK)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label("score on held-out data", fontsize=7, color=_INK)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
    figure.suptitle(title, fontsize=10, fontweight="bold", color=_INK)
    return figure


def _save(figure: Figure, path: str | Path, dpi: int) -> None:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, facecolor="white")
    Path(path).write_bytes(file.getvalue())
