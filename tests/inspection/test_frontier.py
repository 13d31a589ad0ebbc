"""Frontiers as pictures, in notebooks and in TensorBoard."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gatedadapters as ga
from gatedadapters.inspection import TensorBoardWriter, frontier_picture, save_frontier_png
from gatedadapters.structure.frontier import Frontier, FrontierPoint
from gatedadapters.testing.placement_contract import SPACE, probed


def made_up(*points: tuple[int, float], base: float = 3.0) -> Frontier:
    return Frontier(
        tuple(FrontierPoint(cast(ga.Structure, SimpleNamespace(params=size)), loss) for size, loss in points), base
    )


KNEE = made_up((500, 2.8), (4_000, 2.12), (57_600, 2.02), (1_200_000, 2.0))
USELESS = made_up((10, 3.1), (80, 3.2))


def test_the_picture_shows_every_point_and_marks_the_one_that_is_within() -> None:
    figure = frontier_picture({"en": KNEE, "id": USELESS}, within=0.1)
    left, right = figure.axes
    line, mark = (line for line in left.lines if line.get_marker() == "o")
    assert line.get_xydata().tolist() == [[float(p.params), p.loss] for p in KNEE.points]
    assert mark.get_xydata().tolist() == [[57_600.0, 2.02]]
    assert "57,600 parameters:\n98% of the gain" in [text.get_text() for text in left.texts]
    assert left.get_xscale() == "log"
    assert [axes.get_title() for axes in (left, right)] == ["en", "id"]
    assert len([line for line in right.lines if line.get_marker() == "o"]) == 1  # without a gain nothing is marked


def test_the_picture_is_written_as_a_file(tmp_path: Path) -> None:
    save_frontier_png(KNEE, tmp_path / "frontier.png", within=0.02)
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_notebooks_show_frontiers_and_placements_as_tables() -> None:
    page = KNEE._repr_html_()
    assert page.count("<tr>") == 6
    assert "57,600" in page
    assert "98%" in page
    assert "nan" not in USELESS._repr_html_()
    assert math.isnan(USELESS.share(USELESS.points[0]))
    model, batches = probed("bert")
    placement = ga.place(model, SPACE, batches, score="magnitude")
    assert "magnitude" in placement._repr_html_()
    assert placement._repr_html_().count("<tr>") == len(placement.table().splitlines()) - 1


def test_the_table_of_a_placement_adds_up_to_its_candidates_and_its_structure() -> None:
    model, batches = probed("bert")
    placement = ga.place(model, SPACE, batches, score="random")
    structure = placement.structure(ga.Budget(fraction=0.2))
    rows = [line.rsplit(maxsplit=4) for line in placement.table(structure).splitlines()[2:]]
    assert sum(int(row[1].replace(",", "")) for row in rows) == structure.dense_params
    assert sum(int(row[4].replace(",", "")) for row in rows) == structure.params
    rates = [float(row[3]) for row in rows]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1.0


def test_tensorboard_gets_picture_table_and_a_value_for_each_point(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as writer:
        writer.frontier(KNEE, within=0.02)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("frontier/params")] == [
        (number, float(p.params)) for number, p in enumerate(KNEE.points)
    ]
    assert len(events.Scalars("frontier/loss")) == 4
    assert len(events.Images("frontier/picture")) == 1
    assert "frontier/table/text_summary" in events.Tags()["tensors"]
