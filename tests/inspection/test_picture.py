"""The picture shows what the structure says, whatever the depth and the number of tasks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from transformers import LlamaConfig, LlamaModel

import gatedadapters as ga
from gatedadapters.inspection import matrix_picture, picture, save_png
from gatedadapters.inspection.heat_map import HeatMap
from gatedadapters.testing.backbones import tiny


def searched(tasks: tuple[str, ...] = ("default",), layers: int = 3, share: float = 0.3) -> ga.Structure:
    if layers == 3:
        model = tiny("bert")[0]
        space = "encoder-mixed"
    else:
        model = LlamaModel(
            LlamaConfig(
                hidden_size=8,
                intermediate_size=12,
                num_hidden_layers=layers,
                num_attention_heads=2,
                vocab_size=20,
            )
        )
        space = "decoder-mixed"
    adapters = ga.attach(model, space, tasks=tasks)
    bank = adapters.bank
    assert bank is not None
    with torch.no_grad():
        bank.log_alpha.normal_(0.5, 2.0)
    return adapters.discretize(ga.Budget(fraction=share), scores=torch.rand(len(tasks), bank.n_units))


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_ylabel() == "block"]


def shown(panel: Axes) -> dict[tuple[int, int], str]:
    """The number written in each cell, by (row, column)."""
    return {
        (round(text.get_position()[1]), round(text.get_position()[0])): text.get_text()
        for text in panel.texts
        if text.get_text().isdigit()
    }


def test_every_kept_unit_is_shown_where_it_is_and_what_was_dropped_is_grey() -> None:
    structure = searched()
    blocks, columns, cells = structure.grid()
    (panel,) = panels(picture(structure))
    assert shown(panel) == {
        (blocks.index(block), columns.index(column)): str(kept) for (block, column), (kept, _) in cells.items() if kept
    }
    assert sum(kept for kept, _ in cells.values()) == sum(len(path.kept) for path in structure.paths)
    rectangles = [patch for patch in panel.patches if isinstance(patch, Rectangle)]
    outside = [name for name in columns if name.startswith("outside")]  # a row of its own
    assert len(rectangles) == len(cells) == 3 * (len(columns) - len(outside)) + len(outside)
    colours = {patch.get_facecolor() for patch in rectangles}
    assert len(colours) > 2
    assert [label.get_text() for label in panel.get_yticklabels()] == ["0", "1", "2", "3"]
    places = [label.get_text() for label in panel.get_xticklabels()]
    assert {"attn.q", "ffn.down", "attn"} <= set(places)


def test_each_task_has_a_panel_beside_the_stored_one() -> None:
    structure = searched(tasks=("mood", "topic"))
    found = panels(picture(structure))
    assert [panel.get_title() for panel in found] == [
        f"stored: {structure.params:,} parameters",
        f"mood: uses {structure.task_params('mood'):,}",
        f"topic: uses {structure.task_params('topic'):,}",
    ]
    stored, mood, topic = ({place: int(n) for place, n in shown(panel).items()} for panel in found)
    assert mood != topic
    for place, units in stored.items():
        assert max(mood.get(place, 0), topic.get(place, 0)) <= units


@pytest.mark.parametrize("layers", [3, 80])
def test_a_deep_backbone_stays_readable(layers: int, tmp_path: Path) -> None:
    structure = searched(layers=layers)
    figure = picture(structure)
    width, height = figure.get_size_inches()
    assert 2 < height < 12
    assert 4 < width < 12
    (panel,) = panels(figure)
    labels = panel.get_yticklabels()
    assert height * 72 / len(labels) > 7  # points between the labels, which are 7 points high
    save_png(structure, tmp_path / "s.png", dpi=60)
    image = Image.open(tmp_path / "s.png").convert("RGB")
    assert len(image.getcolors(1 << 24)) > 10


def test_nothing_kept_and_nothing_known_are_pictures_too(tmp_path: Path) -> None:
    adapters = ga.attach(tiny("bert")[0], "lora-all-linear")
    assert adapters.bank is not None
    with torch.no_grad():
        adapters.bank.log_alpha.fill_(-4)
    dropped = adapters.discretize()
    assert dropped.params == 0
    (panel,) = panels(picture(dropped))
    assert not shown(panel)
    save_png(dropped.model_copy(update={"offered": ()}), tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 500


def test_the_table_and_the_grid_agree_on_dropped_and_kept() -> None:
    structure = searched()
    blocks, columns, cells = structure.grid()
    lines = structure.table().splitlines()
    assert [line.split()[0] for line in lines[3:]] == [str(block) for block in blocks]
    for block, line in zip(blocks, lines[3:], strict=True):
        offered = [cells[block, name] for name in columns if (block, name) in cells]
        texts = [f"{kept}/{of}" if kept else "-" for kept, of in offered]
        assert line.split()[1:] == texts


def test_a_heat_map_paints_each_cell_in_its_colour_and_nothing_else() -> None:
    heat = HeatMap([0, 1, 2], ["attn.q lora", "ffn.up lora", "ffn scale"], "share")
    values = {(0, "attn.q lora"): 0.0, (1, "ffn.up lora"): 0.4, (2, "ffn scale"): 1.0}
    blank, painted = heat.paint({}), heat.paint(values)
    assert len(np.unique((blank != painted).any(-1).nonzero()[0])) < 70
    for value in values.values():
        colour = np.asarray(heat.colours(value, bytes=True)[:3])
        assert ((painted == colour).all(-1) & (blank == 255).all(-1)).sum() > 200
    assert (heat.paint(dict.fromkeys(values, 1.0)) != painted).any()
    assert (blank == heat.paint({})).all()


def test_a_matrix_shows_its_numbers_where_there_are_any() -> None:
    values = [[0.91, float("nan")], [0.7, 0.8]]
    axes = matrix_picture(["mood", "topic"], values).axes[0]
    shown = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert shown == {(0, 0): "0.91", (1, 0): "0.7", (1, 1): "0.8"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["mood", "topic"]
