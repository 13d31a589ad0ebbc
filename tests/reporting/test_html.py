"""What a notebook shows of a result: well-formed HTML with the numbers of its table, and nothing unescaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

import gatedadapters as ga
from gatedadapters.reporting import html
from gatedadapters.testing.backbones import tiny
from gatedadapters.training.selective import Report
from gatedadapters.transfer import activation_shift
from gatedadapters.transfer.evaluate import TransferReport, TransferScores


class Page(HTMLParser):
    """The cells of every table, row by row, with their styles; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.styles: list[list[list[str]]] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
            self.styles.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.styles[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")
            self.styles[-1][-1].append(dict(attrs)["style"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] in {"td", "th"}:
            self.tables[-1][-1][-1] += data


def searched(tasks: tuple[str, ...]) -> ga.Structure:
    adapters = ga.attach(tiny("bert")[0], "encoder-mixed", tasks=tasks)
    assert adapters.bank is not None
    with torch.no_grad():
        adapters.bank.log_alpha.normal_(0.5, 2.0)
    return adapters.discretize(ga.Budget(fraction=0.3), scores=torch.rand(len(tasks), adapters.bank.n_units))


def test_a_structure_is_a_heat_map_of_its_grid_with_the_parameters_of_each_block() -> None:
    structure = searched(("only",))
    page = Page(structure._repr_html_())
    (table,), (styles,) = page.tables, page.styles
    blocks, columns, cells = structure.grid()
    assert table[0] == ["block", *columns, "parameters"]
    for block, row, looks in zip(blocks, table[1:], styles[1:], strict=True):
        assert row[0] == str(block)
        for column, text, look in zip(columns, row[1:-1], looks[1:-1], strict=True):
            if (block, column) not in cells:  # nothing was offered there
                assert text == ""
                continue
            kept, of = cells[block, column]
            assert text == (f"{kept}/{of}" if kept else "")
            assert (html.shade(kept / of) if kept else html.NOTHING) in look
    assert sum(int(row[-1].replace(",", "")) for row in table[1:]) == structure.params
    assert f"{structure.params:,} parameters" in page.texts[0]


def test_each_task_of_a_structure_has_a_table_of_what_it_uses() -> None:
    structure = searched(("mood", "topic"))
    page = Page(structure._repr_html_())
    stored, *by_task = page.tables
    assert len(by_task) == 2
    for task, table in zip(structure.tasks, by_task, strict=True):
        used = sum(int(row[-1].replace(",", "")) for row in table[1:])
        assert used == structure.task_params(task) < structure.params
        assert f"{task}: uses {used:,}" in page.texts
    assert [row[0] for row in stored] == [row[0] for row in by_task[0]]


def results() -> dict[str, Any]:
    model, batch = tiny("bert")
    masks = [ga.select(ga.score(model, kind="random", seed=s), protect=0.9, contrast=0.0) for s in (0, 1)]
    other, _ = tiny("bert", seed=1)
    shift = activation_shift(model, other, [batch])
    adapters = ga.attach(model, "lora-all-linear")
    adapters.compact(adapters.discretize(ga.Budget(fraction=0.5)))
    scores = tuple(TransferScores(seed, 0.9, 0.7, 0.88, 0.8 + 0.01 * seed, 0.86) for seed in range(3))
    return {
        "mask": masks[0],
        "overlap": masks[0].overlap(masks[1]),
        "shift": shift,
        "merge": adapters.merge(),
        "selective": Report({"domain": 2.0}, {"domain": 1.5}, 10, 1000),
        "transfer": TransferReport(scores),
    }


def test_every_result_shows_the_cells_of_its_plain_table() -> None:
    for name, result in results().items():
        page = Page(result._repr_html_())
        plain = result.table() if hasattr(result, "table") else str(result)
        shown = {cell for table in page.tables for row in table for cell in row if cell}
        assert len(shown) > 5, name
        for cell in shown - {cell for table in page.tables[1:] for row in table for cell in row}:
            assert cell in plain, (name, cell)


def test_a_mask_shows_each_block_and_what_lies_outside_the_blocks() -> None:
    mask = ga.select(ga.score(tiny("t5")[0], kind="random"), protect=0.9, contrast=0.0)
    blocks, roles, cells = mask.grid()
    assert {"encoder.block.0", "decoder.block.2", "-"} <= set(blocks)
    assert sum(selected for selected, _ in cells.values()) == mask.count()
    assert sum(of for _, of in cells.values()) == mask.size
    _, by_block = Page(mask._repr_html_()).tables
    assert [row[0] for row in by_block[1:]] == blocks
    assert by_block[0][1:] == roles


def test_text_is_escaped() -> None:
    page = Page(html.table(["<b>", "&"], [["<script>", "1 < 2"]], title="a & b") + html.folded("<i>", "x"))
    assert page.tables == [[["<b>", "&"], ["<script>", "1 < 2"]]]
    assert "a & b" in page.texts


def test_columns_of_numbers_are_aligned_on_the_right_and_words_on_the_left() -> None:
    rows = [["1", "12/16", "gated-0-ab", "-"], ["2", "-0.5 ± 0.1", "word", ""], ["3", "", "1,000", "+3.0%"]]
    page = Page(html.table(["block", "a", "b", "c"], rows))
    for styles in page.styles[0]:
        sides = [match[1] for style in styles if (match := re.search("text-align:(left|right)", style))]
        assert sides == ["left", "right", "left", "right"]


@pytest.mark.parametrize(
    ("share", "colour"), [(0.0, "#cfe3f3"), (1.0, "#0b2a5b"), (1 / 3, "#5aa2d4"), (2.0, "#0b2a5b")]
)
def test_shades_run_from_light_to_dark(share: float, colour: str) -> None:
    assert html.shade(share) == colour
