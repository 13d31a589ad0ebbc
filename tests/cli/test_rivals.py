"""What a search leaves when a rival, or the search itself, comes to nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gatedadapters.cli import main
from gatedadapters.errors import TrainingError
from gatedadapters.experiments.arms import ArmRunner

Configured = Callable[..., Path]
TRAINING = {"steps": 4, "batch_size": 4, "precision": "fp32", "device": "cpu"}
RESULTS = {"adapter", "tensorboard", "metrics.json", "structure.png", "search.yaml", "table.txt"}


def test_a_rival_that_cannot_be_as_small_is_left_out_and_named(
    tables: Path, configured: Configured, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configured(budget={"params": 40}, compare=["uniform", "random"], training=TRAINING)
    out = tables / "out"
    assert main(["search", str(path), "--out", str(out)]) == 0
    assert {file.name for file in out.iterdir()} == RESULTS
    metrics = json.loads((out / "metrics.json").read_text())
    assert [arm["name"] for arm in metrics["arms"]] == ["searched", "random structure"]
    assert "below the smallest candidate" in metrics["left_out"]["uniform LoRA"]
    for text in ((out / "table.txt").read_text(), capsys.readouterr().out):
        assert "uniform LoRA was not trained: the budget is below the smallest candidate (expected at least" in text


def test_an_empty_structure_has_no_rivals(tables: Path, encoder: Path) -> None:
    task = {"train": str(tables / "mood.csv")}
    training = {**TRAINING, "steps": 40, "gate_learning_rate": 5.0, "max_length": 16}
    config = {
        "model": str(encoder),
        "tasks": [task],
        "penalty": {"weight": 1e6},
        "training": training,
        "compare": ["uniform", "random"],
        "schedule": {"warmup": 0, "ramp": 0.1, "prune": 0.9},
    }
    (tables / "empty.yaml").write_text(json.dumps(config))
    assert main(["search", str(tables / "empty.yaml"), "--out", str(tables / "out")]) == 0
    metrics = json.loads((tables / "out" / "metrics.json").read_text())
    assert [(arm["name"], arm["params"]) for arm in metrics["arms"]] == [("searched", 0)]
    assert metrics["left_out"].keys() == {"uniform LoRA", "random structure"}


def test_a_rival_that_breaks_off_leaves_the_search_and_its_numbers(
    tables: Path, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise TrainingError("the loss is not finite")

    monkeypatch.setattr(ArmRunner, "run_rival", broken)
    out = tables / "out"
    assert main(["search", str(configured(compare=["random"], training=TRAINING)), "--out", str(out)]) == 2
    assert {file.name for file in out.iterdir()} == RESULTS
    assert [arm["name"] for arm in json.loads((out / "metrics.json").read_text())["arms"]] == ["searched"]


def test_a_run_that_failed_does_not_block_the_next(
    tables: Path, configured: Configured, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configured(training={**TRAINING, "learning_rate": 1e20})
    out = tables / "out"
    for _ in range(2):
        assert main(["search", str(path), "--out", str(out)]) == 2
        assert "the loss is not finite" in capsys.readouterr().err
        assert [file.name for file in out.iterdir()] == ["tensorboard"]
        assert len(list((out / "tensorboard" / "searched").glob("*tfevents*"))) == 1
