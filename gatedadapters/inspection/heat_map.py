"""A heat map that is painted many times: its frame is drawn once, a new picture costs little more than a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gatedadapters.html import INK
from gatedadapters.inspection.picture import COLOURS, label_axes, pixels

_WIDTH, _HEIGHT, _TALLEST, _DPI = 0.34, 0.27, 8.5, 100  # inches of a cell at most, inches in all, dots per inch


class HeatMap:
    """Blocks by columns; white where there is no cell.

    Args:
        blocks: names of the rows.
        columns: names of the columns; the last word of a name of several is written above its neighbours'.
        label: what the colours mean.
        colours: over `limits`.
        limits: values at the ends of the colours.
    """

    def __init__(
        self,
        blocks: Sequence[int | str],
        columns: Sequence[str],
        label: str,
        *,
        colours: Colormap = COLOURS,
        limits: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.colours, self.norm = colours, Normalize(*limits)
        width = max(_WIDTH * len(columns), 1.2)
        height = min(max(_HEIGHT * len(blocks), 0.8), _TALLEST)
        figure = Figure(figsize=(width + 1.9, height + 1.5), layout="constrained")
        figure.set_dpi(_DPI)
        axes = figure.subplots()
        label_axes(axes, blocks, columns, height / len(blocks))
        bar = figure.colorbar(ScalarMappable(self.norm, colours), ax=axes, aspect=20)
        bar.set_label(label, color=INK, fontsize=7)
        bar.ax.tick_params(labelsize=7, colors=INK, length=2)
        bar.outline.set_visible(False)
        self._frame = pixels(figure, dpi=_DPI)
        at = axes.transData.transform  # pixels from the bottom left
        x = at([(column - 0.5, 0.0) for column in range(len(columns) + 1)])[:, 0].round().astype(int)
        y = len(self._frame) - at([(0.0, row - 0.5) for row in range(len(blocks) + 1)])[:, 1].round().astype(int)
        self._cells = {
            (block, column): np.s_[y[i] : y[i + 1] - 1, x[j] + 1 : x[j + 1]]
            for i, block in enumerate(blocks)
            for j, column in enumerate(columns)
        }

    def paint(self, values: Mapping[Any, float]) -> NDArray[np.uint8]:
        """The picture of these values by (block, column), (height, width, 3)."""
        picture = self._frame.copy()
        colours = self.colours(self.norm(np.fromiter(values.values(), float, len(values))), bytes=True)
        for place, colour in zip(values, colours, strict=True):
            picture[self._cells[place]] = colour[:3]
        return picture
