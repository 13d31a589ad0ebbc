"""Studies from the command line, with real (tiny) trainings: what they leave, how they go on, what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from optuna import TrialPruned

import gatedadapters as ga
from gatedadapters.cli import main
from gatedadapters.config import SearchConfig, StudyConfig
from gatedadapters.errors import DataError
from gatedadapters.studies import Study
from gatedadapters.studies.objective import measure

Configured = Callable[..., Path]


@pytest.fixture
def studied(tables: Path, configured: Configured, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes study.yaml beside search.yaml, and works there."""
    monkeypatch.chdir(tables)

    def write(**changes: object) -> Path:
        configured(
            space="lora-all-linear",
            noise={"kind": "token_replacement", "ratio": 0},
            perturbation={"kind": "nearest_embedding", "ratio": 0},
            schedule={"warmup": 0.0, "ramp": 0.25, "prune": 0.7},
            training={"steps": 8, "batch_size": 4, "gate_learning_rate": 3.0, "precision": "fp32", "device": "cpu"},
        )
        data: dict[str, object] = {
            "name": "tiny",
            "search": "search.yaml",
            "factors": {
                "penalty.weight": {"values": [0.1, 1.0e4]},
                "noise.ratio": {"values": [0.0, 0.5]},
                "perturbation.ratio": {"values": [0.0, 1.0]},
            },
            "sides": {"gated": {}, "uniform": {}, "full": {"training.learning_rate": 1.0e-3}},
            "seeds": [0],
        }
        (tables / "study.yaml").write_text(yaml.safe_dump(data | changes))
        return tables / "study.yaml"

    return write


def test_a_study_trains_every_side_prunes_and_reports(
    studied: Callable[..., Path], tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = studied()
    assert main(["study", str(path), "--trials", "1"]) == 0
    assert "1 complete" in capsys.readouterr().out
    assert main(["study", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "8 complete" in printed
    assert "failed" not in printed
    found = ga.Study.load(path, storage="tiny.journal")
    by_side = {side: [t for t in found.trials if t.user_attrs["side"] == side] for side in ("gated", "uniform", "full")}
    assert [len(trials) for trials in by_side.values()] == [4, 2, 2]
    sizes = {t.params.get("penalty.weight"): t.user_attrs["params"] for t in by_side["gated"]}
    assert sizes[1e4] < sizes[0.1]
    assert by_side["uniform"][0].user_attrs["params"] == pytest.approx(sizes[None], rel=0.1)
    assert by_side["full"][0].user_attrs["params"] > 10 * sizes[None]
    plain = [t for t in found.trials if t.user_attrs["perturbed"]]
    assert len(plain) == 3
    for trial in found.trials:
        assert trial.user_attrs["scores"].keys() == {"mood", "animal"}
    assert (tables / "tiny-report" / "report.html").is_file()
    assert (tables / "tiny-report" / "sensitivity.png").is_file()

    best = SearchConfig.load(tables / "tiny-report" / "best-1.yaml")
    assert best.model == SearchConfig.load(tables / "search.yaml").model
    assert main(["report", str(path), "--out", "again"]) == 0
    assert (tables / "again" / "report.md").read_text() == (tables / "tiny-report" / "report.md").read_text()


def test_optimising_from_the_command_line_scores_validation_data(
    studied: Callable[..., Path], tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    factors = {"training.learning_rate": {"low": 1.0e-4, "high": 1.0e-2, "log": True}}
    path = studied(mode="optimise", factors=factors, sides={"gated": {}}, trials=3, name="best")
    assert main(["study", str(path), "--storage", "best.journal"]) == 0
    assert "best-report" in capsys.readouterr().out
    found = ga.Study.load(path, storage="best.journal")
    assert len(found.trials) == 3
    assert all(set(trial.intermediate_values) == {6} for trial in found.trials)


def test_a_trial_that_is_pruned_stops_in_the_middle_of_training(studied: Callable[..., Path], tables: Path) -> None:
    studied()
    told: list[tuple[int, float]] = []

    def report(step: int, value: float) -> None:
        told.append((step, value))
        raise TrialPruned

    with pytest.raises(TrialPruned):
        measure(SearchConfig.load(tables / "search.yaml"), "gated", split="validation", report=report)
    ((step, value),) = told
    assert step == 6
    assert 0 <= value <= 1


def test_a_search_meets_noise_and_is_tested_on_perturbed_data(
    studied: Callable[..., Path], tables: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    studied()
    data = yaml.safe_load((tables / "search.yaml").read_text())
    data |= {"noise": {"kind": "embedding", "ratio": 0.1}, "perturbation": {"kind": "token_deletion", "ratio": 1.0}}
    del data["budget"]
    data["penalty"] = {"weight": 0.1}
    (tables / "noisy.yaml").write_text(yaml.safe_dump(data))
    assert main(["search", "noisy.yaml", "--out", "noisy"]) == 0
    assert "perturbed" in capsys.readouterr().out
    (arm,) = json.loads((tables / "noisy" / "metrics.json").read_text())["arms"]
    assert arm["perturbed"].keys() == arm["accuracy"].keys()


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "expected:" in message
    return message


def test_what_is_wrong_is_named(studied: Callable[..., Path], tables: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = studied()
    assert "no-such" in refused(["study", "no-such"], capsys)
    assert "--workers" in refused(["study", str(path), "--workers", "0"], capsys)
    assert "SQLite" in refused(["study", str(path), "--storage", "sqlite:///x.db", "--workers", "2"], capsys)
    assert "no such storage" in refused(["report", str(path), "--storage", "new.journal"], capsys)
    assert not Path("new.journal").exists()
    studied(factors={"nonsense": {"values": [1]}})
    assert "penalty.weight" in refused(["study", str(path)], capsys)
    studied(factors={"noise.ratio": {"low": 0.3, "high": 0.1}})
    assert "inverted" in refused(["study", str(path)], capsys)
    assert not (tables / "tiny-report").exists()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_table_that_cannot_be_read_is_refused_before_a_trial_is_stored(
    split: str, tmp_path: Path, configured: Configured
) -> None:
    data = yaml.safe_load(configured().read_text())
    data["tasks"] = [{"train": "mood.csv", split: "nowhere.csv"}]
    configured(**data)
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump({"name": "s", "search": "search.yaml", "factors": {"training.steps": {"values": [2]}}})
    )
    found = Study(StudyConfig.load(tmp_path / "study.yaml"), storage=tmp_path / "study.journal")
    with pytest.raises(DataError, match=r"nowhere\.csv"):
        found.run()
    assert not found.trials
