"""Tables and heat maps as HTML, for the `_repr_html_` of results and for reports."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

TableCell = tuple[int, int]  # (row, column)

# Colours of shares from 0 to 1, light to dark, as in pictures. Grey: offered, and nothing kept.
SHADES, NOTHING, INK = ("#cfe3f3", "#5aa2d4", "#1f5fa6", "#0b2a5b"), "#f3f2ef", "#22303c"
_BAR = "#cfe3f3"


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str = "",
    shares: Mapping[TableCell, float] | None = None,
    bars: Mapping[TableCell, float] | None = None,
) -> str:
    """A table as HTML. Every text is escaped. Columns of numbers are aligned on the right, except the first.

    Args:
        header: titles of the columns.
        rows: texts, one for each column.
        title: shown above the table.
        shares: colours cells by a share in [0, 1]; 0 is grey.
        bars: draws a bar behind the text of cells; its length is a share of the cell's width, in [0, 1].
    """
    sides = ["right" if column and _holds_numbers(rows, column) else "left" for column in range(len(header))]
    looks = {place: _shaded(share) for place, share in (shares or {}).items()}
    looks |= {place: _barred(length) for place, length in (bars or {}).items()}
    head = "".join(
        f'<th style="text-align:{sides[i]};padding:2px 6px">{escape(text)}</th>' for i, text in enumerate(header)
    )
    body = []
    for i, row in enumerate(rows):
        cells = (
            f'<td style="text-align:{sides[j]};padding:2px 6px{looks.get((i, j), "")}">{escape(text)}</td>'
            for j, text in enumerate(row)
        )
        body.append(f"<tr>{''.join(cells)}</tr>")
    caption = f'<caption style="text-align:left;font-weight:bold">{escape(title)}</caption>' if title else ""
    return (
        f'<table style="border-collapse:collapse;font-size:90%">{caption}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def grid(
    blocks: Sequence[int | str],
    columns: Sequence[str],
    texts: Mapping[tuple[Any, str], str],
    shares: Mapping[tuple[Any, str], float],
    *,
    title: str = "",
    ends: Mapping[Any, float] | None = None,
    end: str = "",
) -> str:
    """A heat map as a table, with one row for each block. A cell without text and share stays empty.

    Args:
        blocks: names of the rows.
        columns: names of the columns.
        texts: texts by (block, column).
        shares: shares by (block, column), in [0, 1], shown as colours.
        title: shown above the table.
        ends: a whole number for each block, shown with a bar in a last column.
        end: name of that column.
    """
    rows = [[str(block), *(texts.get((block, name), "") for name in columns)] for block in blocks]
    colours = {
        (row, column): shares[block, name]
        for row, block in enumerate(blocks)
        for column, name in enumerate(columns, start=1)
        if (block, name) in shares
    }
    if ends is None:
        return table(["block", *columns], rows, title=title, shares=colours)
    rows = [[*row, f"{ends[block]:,}"] for row, block in zip(rows, blocks, strict=True)]
    most = max(ends.values(), default=0) or 1
    bars = {(row, 1 + len(columns)): ends[block] / most for row, block in enumerate(blocks)}
    return table(["block", *columns, end], rows, title=title, shares=colours, bars=bars)


def folded(title: str, content: str) -> str:
    """Content that stays hidden until a reader clicks on its title."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _holds_numbers(rows: Sequence[Sequence[str]], column: int) -> bool:
    return all(re.match(r"[+-]?\d|-?$", row[column]) for row in rows)


def _shaded(share: float) -> str:
    ink = "#ffffff" if share > 0.4 else INK
    return f";background:{shade(share) if share > 0 else NOTHING};color:{ink};border:1px solid #ffffff"


def _barred(length: float) -> str:
    end = f"{100 * length:.0f}%"
    return f";background:linear-gradient(to right,{_BAR} {end},transparent {end})"


def shade(share: float) -> str:
    """The colour of a share in [0, 1], interpolated between `SHADES`."""
    place = min(max(share, 0.0), 1.0) * (len(SHADES) - 1)
    low = min(int(place), len(SHADES) - 2)
    pairs = zip(_rgb(SHADES[low]), _rgb(SHADES[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - low)):02x}" for a, b in pairs)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
