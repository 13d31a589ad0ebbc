"""A picture of a structure: the share of the offered units that is kept, by block and place."""

from __future__ import annotations

import io
import math
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from gatedadapters.reporting.html import INK, NOTHING, SHADES
from gatedadapters.safe_files import file_errors
from gatedadapters.structure.structure import Structure

Panel = tuple[str, dict[tuple[int, str], tuple[int, int]]]

COLOURS = LinearSegmentedColormap.from_list("share", SHADES)
_FAINT = "#8b949c"
_WIDTH, _HEIGHT = 0.34, 0.27  # inches of a cell, at most
_TALLEST = 8.5  # inches of a panel
_LABELS = (0.8, 1.45)  # inches beside and above or below a panel
_ASPECT = 2.2  # width by height that several panels are arranged for


def picture(structure: Structure, *, title: str | None = None) -> Figure:
    """A heat map of the share of the offered units that is kept. Rows are blocks, columns sub-layer, role and kind.

    With several tasks, one panel shows the stored units, and one panel for each task those that it uses. Grey: nothing
    is kept. White: nothing was offered. Numbers count units, where there is room.

    Args:
        structure: a structure of any depth. Cells get smaller with the number of blocks.
        title: shown above the panels; default: the size of the structure.
    """
    blocks, columns, cells = structure.grid()
    if not blocks:
        return _empty(title or "an empty structure: nothing was offered")
    tasks = structure.tasks if len(structure.tasks) > 1 else ()
    panels: list[Panel] = [(f"stored: {structure.params:,} parameters", cells)] if tasks else [("", cells)]
    panels += [(f"{task}: uses {structure.task_params(task):,}", structure.grid(task)[2]) for task in tasks]
    height = min(_HEIGHT * len(blocks), _TALLEST)
    width = _WIDTH * len(columns)
    across, down = _arranged(len(panels), width + _LABELS[0], height + _LABELS[1])
    size = (max(5.0, across * (width + _LABELS[0]) + 0.9), down * (height + _LABELS[1]) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[union-attr,call-arg]
    axes = figure.subplots(down, across, squeeze=False)
    norm = Normalize(0, 1)
    for place, (name, found) in zip(axes.flat, panels, strict=False):
        _draw(place, name, blocks, columns, found, norm, height / len(blocks))
    for spare in axes.flat[len(panels) :]:
        spare.set_axis_off()
    bar = figure.colorbar(
        ScalarMappable(norm, COLOURS),
        ax=axes,
        fraction=0.3 / size[0],
        aspect=20,
        shrink=min(1.0, 2.6 / size[1]),
        pad=0.1 / size[0],
    )
    quiet(bar, "share of the offered\nunits kept (grey: none)")
    figure.suptitle(title or _size(structure), color=INK, fontsize=11, fontweight="bold")
    return figure


def save_png(structure: Structure, path: str | Path, *, title: str | None = None, dpi: int = 150) -> None:
    """Write `picture(structure)` as a PNG file."""
    save_figure(picture(structure, title=title), path, dpi=dpi)


def quiet(bar: Colorbar, label: str = "") -> None:
    """Make a colour bar small, without a frame, and label it."""
    bar.set_label(label, color=INK, fontsize=7)
    bar.ax.tick_params(labelsize=7, colors=INK, length=2)
    bar.outline.set_visible(False)


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 150) -> None:
    """Write a figure as a PNG file. The file is opened after drawing, so an error while drawing leaves no file."""
    data = png_bytes(figure, dpi=dpi)
    with file_errors("write the picture", path):
        Path(path).write_bytes(data)


def png_bytes(figure: Figure, *, dpi: int) -> bytes:
    """The bytes of a figure's PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, facecolor="white")
    return file.getvalue()


def pixels(figure: Figure, dpi: int = 90) -> NDArray[np.uint8]:
    """A figure as an array, uint8 (height, width, 3)."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _arranged(panels: int, width: float, height: float) -> tuple[int, int]:
    """The number of panels across and down that comes close to the aspect `_ASPECT` with few empty places."""

    def cost(across: int) -> float:
        down = -(-panels // across)
        return abs(math.log(across * width / (down * height * _ASPECT))) + 0.25 * (across * down - panels)

    best = min(range(1, panels + 1), key=cost)
    return best, -(-panels // best)


def _draw(
    place: Axes,
    name: str,
    blocks: list[int],
    columns: list[str],
    cells: dict[tuple[int, str], tuple[int, int]],
    norm: Normalize,
    cell_height: float,
) -> None:
    row = {block: index for index, block in enumerate(blocks)}
    column = {label: index for index, label in enumerate(columns)}
    for (block, label), (kept, of) in cells.items():
        share = kept / of if of else 0.0
        corner = (column[label] - 0.5, row[block] - 0.5)
        colour = COLOURS(norm(share)) if kept else NOTHING
        place.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white", linewidth=0.8))
        if kept and cell_height >= 0.14:
            ink = "white" if share > 0.4 else INK
            place.text(column[label], row[block], str(kept), ha="center", va="center", color=ink, fontsize=7)
    place.set_xlim(-0.5, len(columns) - 0.5)
    place.set_ylim(len(blocks) - 0.5, -0.5)
    places = [label.rpartition(" ")[0] for label in columns]
    place.set_xticks(range(len(columns)), places, rotation=90, fontsize=7, color=INK)
    every = max(1, round(0.16 / cell_height))
    place.set_yticks(range(0, len(blocks), every), [str(b) for b in blocks[::every]], fontsize=7, color=INK)
    place.tick_params(length=0, pad=3)
    for side in place.spines.values():
        side.set_visible(False)
    place.set_ylabel("block", fontsize=8, color=INK)
    end = 0
    for kind, members in groupby(columns, key=lambda label: label.rpartition(" ")[2]):
        start, end = end, end + len(list(members))
        place.annotate(
            kind,
            ((start + end - 1) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=7,
            color=_FAINT,
        )
        if start:
            place.axvline(start - 0.5, color=_FAINT, linewidth=0.8)
    if name:
        place.set_title(name, fontsize=9, color=INK, pad=16)


def _size(structure: Structure) -> str:
    share = f", {structure.params / structure.dense_params:.1%} of the candidates" if structure.dense_params else ""
    return f"{structure.params:,} adapter parameters{share}"


def _empty(title: str) -> Figure:
    figure = Figure(figsize=(5, 1), layout="constrained")
    figure.suptitle(title, color=INK, fontsize=11)
    return figure
