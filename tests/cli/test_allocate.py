"""An allocation from the command line: what it leaves, what a search does with it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import gatedadapters as ga
from gatedadapters.cli import main
from gatedadapters.config import AllocateConfig, SearchConfig

Configured = Callable[..., Path]
SPACE = {"paths": [{"kind": "lora", "rank": 2, "at": {"sublayers": ["feed_forward"]}}, {"kind": "norm"}]}
QUICK = {"steps": 3, "batch_size": 4, "precision": "fp32", "device": "cpu", "learning_rate": 1e-2}


def test_what_was_allocated_to_two_tasks_is_trained_by_a_search(
    tables: Path, configured: Configured, width: Callable[[Path], int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = configured(space=SPACE, budget={"params": 500}, score="gradient", probe_batches=4, training=QUICK)
    out = tables / "allocated"
    assert main(["allocate", str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {
        *("structure.json", "structure.png", "worth.json", "metrics.json", "table.txt", "allocate.yaml")
    }
    structure = ga.Structure.load(out)
    assert structure.tasks == ("mood", "animal")
    assert 400 < structure.params <= 500
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["params"] == structure.params
    assert metrics["score"] == "gradient"
    assert (out / "table.txt").read_text() in printed
    assert width(out / "structure.png") > 300
    worth = json.loads((out / "worth.json").read_text())
    assert worth.keys() == {"mood", "animal"}
    for record in structure.paths:  # what is kept is worth something to those who use it
        assert all(max(worth[task][record.key]) > 0 for task in record.units)
    assert AllocateConfig.load(out / "allocate.yaml").as_written(tables) == AllocateConfig.load(path).as_written(tables)

    data = yaml.safe_load(path.read_text())
    search = {key: value for key, value in data.items() if key not in ("score", "probe_batches")}
    path.write_text(yaml.safe_dump(search | {"structure": "allocated", "compare": ["random"]}))
    assert main(["search", str(path), "--out", str(tables / "trained")]) == 0
    capsys.readouterr()
    found = json.loads((tables / "trained" / "metrics.json").read_text())["arms"]
    assert [arm["name"] for arm in found] == ["given structure", "random structure"]
    assert found[0]["params"] == structure.params
    trained = ga.Structure.load(tables / "trained" / "adapter")
    assert {p.key: p.units for p in trained.paths} == {p.key: p.units for p in structure.paths}
    again = SearchConfig.load(tables / "trained" / "search.yaml").structure
    assert again is not None
    assert Path(again).resolve() == out.resolve()


def test_the_file_of_a_search_will_do_and_a_relative_budget_leaves_its_frontier(
    decoder: Path, texts: Path, configured: Configured, width: Callable[[Path], int], capsys: pytest.CaptureFixture[str]
) -> None:
    task = {"kind": "text", "name": "questions", "train": "questions.csv", "text": "question", "answer": "answer"}
    path = configured(model=str(decoder), tasks=[task], space=SPACE, budget={"within": 0.2}, training=QUICK)
    out = texts / "allocated"
    assert main(["allocate", str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Size against held-out loss, questions:" in printed
    (frontier,) = json.loads((out / "metrics.json").read_text())["frontiers"]
    base, dense = frontier["base"], frontier["points"][-1]["loss"]
    enough = [p["params"] for p in frontier["points"] if base - p["loss"] >= 0.8 * (base - dense)]
    structure = ga.Structure.load(out)
    assert structure.params <= min(enough)
    assert width(out / "frontier.png") > 300
    assert main(["search", str(path), "--out", str(texts / "searched")]) == 0  # the budget of a search may be relative
    assert json.loads((texts / "searched" / "metrics.json").read_text())["arms"][0]["params"] > 0


@pytest.mark.parametrize(
    ("command", "changes", "says"),
    [
        ("allocate", {"score": "astrology"}, ["AllocationError", "no such placement score", "moved", "'astrology'"]),
        ("allocate", {"penalty": {"weight": 1.0}}, ["ConfigError", "no size to allocate"]),
        ("allocate", {"probe_batches": 0}, ["probe_batches", "greater than 0"]),
        ("allocate", {"budget": {"params": 10**9}}, ["BudgetError", "larger than all candidates"]),
        ("search", {"prior": "astrology"}, ["AllocationError", "no such placement score", "closing", "prior"]),
        ("search", {"structure": "nowhere.json"}, ["ArtifactError", "the structure cannot be read", "nowhere.json"]),
        ("search", {"score": "moved"}, ["ConfigError", "score"]),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_left(
    command: str, changes: dict[str, object], says: list[str], tables: Path, configured: Configured,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = {"space": SPACE, "training": QUICK, **changes}
    path = configured(**given)
    if "penalty" in changes:
        path.write_text(yaml.safe_dump({k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "budget"}))
    before = sorted(tables.rglob("*"))
    assert main([command, str(path), "--out", str(tables / "out")]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in says:
        assert part in message
    assert sorted(tables.rglob("*")) == before


def test_results_are_replaced_only_if_one_says_so(tables: Path, configured: Configured) -> None:
    path = configured(space=SPACE, budget={"params": 500}, score="magnitude", probe_batches=1, training=QUICK)
    command = ["allocate", str(path), "--out", str(tables / "out")]
    assert main(command) == 0
    assert main(command) == 2
    assert main([*command, "--overwrite"]) == 0
