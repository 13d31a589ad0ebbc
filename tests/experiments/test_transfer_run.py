"""A transfer from Python: what it returns, and what is decided once for all of its trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gatedadapters import experiments
from gatedadapters.config import TransferConfig
from gatedadapters.experiments import run_transfer
from gatedadapters.experiments.base_pair import Measured
from gatedadapters.experiments.repairs import ANEW, DIRECT, RepairReport, lengths


@pytest.fixture
def config(tables: Path, encoder: Path) -> TransferConfig:
    """Of a base and an update that changed nothing."""
    data = {
        "model": str(encoder),
        "update": str(encoder),
        "tasks": [{"train": str(tables / "mood.csv")}],
        "seeds": [0],
        "training": {"steps": 2, "batch_size": 4, "precision": "fp32", "device": "cpu", "max_length": 16},
    }
    return TransferConfig.parse(data, where="test")


def test_a_transfer_returns_scores_and_shift(config: TransferConfig, tmp_path: Path) -> None:
    result = experiments.transfer(config, out=tmp_path / "out")
    (scores,) = result.report.scores
    assert scores.direct == scores.old  # the same base twice
    assert scores.retuned == scores.old
    assert result.shift.mean("feed_forward") == 0
    assert result.given is None
    assert [found.value for found in result.damage] == [0]
    assert result.repairs.arms["trained anew"][0].accuracy == scores.old
    assert result.repairs.arms["trained anew, 1 steps"][0] != result.repairs.arms["carried as it is"][0]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics | json.loads(json.dumps(result.report.to_data())) == metrics
    assert (tmp_path / "out" / "table.txt").read_text() == result.table() + "\n"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("adapter", "transfer-trained", "metrics.json", "shift.png", "table.txt", "transfer.yaml")
    }


def test_a_language_model_is_repaired_in_loss(decoder: Path, texts: Path, tmp_path: Path) -> None:
    data = {
        "model": str(decoder),
        "update": str(decoder),
        "tasks": [{"kind": "text", "train": str(texts / "story.txt")}],
        "seeds": [0],
        "repair": [0.5],
        "training": {"steps": 4, "batch_size": 4, "precision": "fp32", "device": "cpu", "max_length": 16},
    }
    result = experiments.transfer(TransferConfig.parse(data, where="test"), out=tmp_path / "out")
    arms = result.repairs.arms
    assert list(arms)[1:4] == [
        *(f"repaired, 2 steps, {how}" for how in ("labels", "no labels")),
        "trained anew, 2 steps",
    ]
    assert all(scores[0].accuracy is None for scores in arms.values())
    assert arms["repaired, 2 steps, no labels"][0].loss == pytest.approx(arms["carried as it is"][0].loss, abs=0.05)
    assert result.losses.scores == result.report.scores
    assert "the same in loss" not in result.table()


def test_lengths_of_repairs_are_whole_steps_each_once() -> None:
    assert lengths((0.05, 0.1, 0.25), 120) == [6, 12, 30]
    assert lengths((0.05, 0.1, 0.25), 4) == [1]


def test_recovery_of_a_repair_is_in_loss_and_paired_by_seed() -> None:
    def measured(*losses: float) -> tuple[Measured, ...]:
        return tuple(Measured(loss, None) for loss in losses)

    arms = {DIRECT: measured(2.0, 3.0), "repaired": measured(1.6, 2.6), ANEW: measured(1.5, 2.5)}
    assert RepairReport(arms).recovered("repaired").value == pytest.approx(0.8)
    assert RepairReport(arms).recovered(DIRECT).value == 0
    row = next(line for line in RepairReport(arms).table().splitlines() if line.startswith("repaired"))
    assert "80%" in row


def test_the_faster_precision_is_found_out_once_for_all_trainings(
    config: TransferConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Reached(Exception):  # noqa: N818
        pass

    def stop(config: Any, *args: Any) -> Any:
        assert config.training.precision == "bf16"
        raise Reached

    monkeypatch.setattr(run_transfer, "use_bf16", lambda config: True)
    monkeypatch.setattr(run_transfer, "BasePair", stop)
    with pytest.raises(Reached):
        experiments.transfer(config, tmp_path / "out")
