"""A heat map that is painted many times. Its frame is drawn once, so a new picture costs little more than a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from gatedadapters.reporting.html import INK
from gatedadapters.structure.picture import COLOURS, pixels

_CELL, _TALLEST, _DPI, _POINTS = 0.2, 8.5, 100, 7  # inches of a cell, inches in all, dots per inch, size of letters
_LEFT, _RIGHT, _TOP, _LETTER = 0.6, 0.6, 0.3, 0.075  # inches beside and above the cells, and of a letter


class HeatMap:
    """A heat map with blocks as rows. Places without a value stay white.

    Its size suits TensorBoard, which shows a picture of a dozen columns without scaling it.

    Args:
        blocks: names of the rows.
        columns: names of the columns. A line separates columns that end in different words.
        label: the meaning of the colours.
        colours: the colour map.
        limits: values at the two ends of the colour map.
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
        width, height = max(_CELL * len(columns), 2.0), max(min(_CELL * len(blocks), _TALLEST), 0.6)
        left = max(_LEFT, 0.25 + _LETTER * max(len(str(block)) for block in blocks))
        bottom = 0.15 + _LETTER * max(map(len, columns))
        size = left + width + _RIGHT, bottom + height + _TOP
        figure = Figure(figsize=size, dpi=_DPI)  # with fixed positions: a layout engine takes ten times as long
        axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(blocks) - 0.5, -0.5)
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=_POINTS, color=INK)
        every = max(1, round(len(blocks) * 0.13 / height))
        axes.set_yticks(range(0, len(blocks), every), [str(b) for b in blocks[::every]], fontsize=_POINTS, color=INK)
        axes.set_ylabel("block", fontsize=_POINTS, color=INK)
        axes.set_title(label, fontsize=_POINTS, color=INK, loc="left", pad=4)
        axes.tick_params(length=0, pad=3)
        axes.spines[:].set_visible(False)
        place = (left + width + 0.08) / size[0], bottom / size[1], 0.08 / size[0], height / size[1]
        bar = figure.colorbar(ScalarMappable(self.norm, colours), cax=figure.add_axes(place), ticks=limits)
        bar.ax.set_yticklabels([f"{limit:.2g}" for limit in limits], fontsize=_POINTS, color=INK)
        bar.ax.tick_params(length=0)
        bar.outline.set_visible(False)
        self._frame = pixels(figure, dpi=_DPI)
        at = axes.transData.transform  # pixels from the bottom left
        x = at([(column - 0.5, 0.0) for column in range(len(columns) + 1)])[:, 0].round().astype(int)
        y = len(self._frame) - at([(0.0, row - 0.5) for row in range(len(blocks) + 1)])[:, 1].round().astype(int)
        kinds = [column.rpartition(" ")[2] if " " in column else "" for column in columns]
        gap = [1 + 2 * (i > 0 and kinds[i] != kinds[i - 1]) for i in range(len(columns))]
        self._cells = {
            (block, column): np.s_[y[i] : y[i + 1] - 1, x[j] + gap[j] : x[j + 1]]
            for i, block in enumerate(blocks)
            for j, column in enumerate(columns)
        }

    def paint(self, values: Mapping[Any, float]) -> NDArray[np.uint8]:
        """The picture, uint8 (height, width, 3), of values by (block, column)."""
        picture = self._frame.copy()
        colours = self.colours(self.norm(np.fromiter(values.values(), float, len(values))), bytes=True)
        for place, colour in zip(values, colours, strict=True):
            picture[self._cells[place]] = colour[:3]
        return picture
