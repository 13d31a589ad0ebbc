"""A transfer from Python: what it returns, and what is decided once for all of its trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gatedadapters import experiments
from gatedadapters.config import TransferConfig
from gatedadapters.experiments import run_transfer


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
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics | json.loads(json.dumps(result.report.to_data())) == metrics
    assert (tmp_path / "out" / "table.txt").read_text() == result.table() + "\n"
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("adapter", "transfer-trained", "metrics.json", "shift.png", "table.txt", "transfer.yaml")
    }


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
