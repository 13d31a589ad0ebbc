"""`gatedadapters continual`: one command from a configuration to matrix, pictures, table and states."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gatedadapters as ga
from gatedadapters import experiments
from gatedadapters.cli.main import main
from gatedadapters.config import ContinualConfig
from gatedadapters.errors import ConfigError
from gatedadapters.experiments import run_continual
from gatedadapters.experiments.streams import build_stream

TRAINING = {"steps": 3, "batch_size": 4, "max_length": 16, "learning_rate": 0.01, "device": "cpu"}
ANIMAL = {"name": "animal", "train": "animal.jsonl", "text": "line", "label": "kind"}
PROBE = {"steps": 2, "batch_size": 4, "fisher_batches": 2}


@pytest.fixture
def continual(tables: Path, encoder: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        data = {
            "model": str(encoder),
            "tasks": [{"train": "mood.csv"}, ANIMAL],
            "strategy": {"kind": "l2_fisher", "probe": PROBE},
            "training": TRAINING,
        }
        path = tables / "continual.yaml"
        path.write_text(yaml.safe_dump(data | changes))
        return path

    return write


def test_one_command_ends_with_matrix_pictures_table_and_states(
    continual: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    width: Callable[[Path], int],
) -> None:
    out = tmp_path / "out"
    config = continual(compare=["random"], general={**ANIMAL, "name": "general"})
    assert main(["continual", str(config), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (out / "table.txt").read_text().strip() in printed
    assert all(word in printed for word in ("OP", "forgetting", "general delta", "core of mood", "heads not counted"))
    data = json.loads((out / "metrics.json").read_text())["streams"]
    assert list(data) == ["l2_fisher", "random"]
    elements = {name: [s["elements"] for s in streams[0]["stages"]] for name, streams in data.items()}
    assert elements["random"] == elements["l2_fisher"]
    for name in ("l2_fisher", "random", "l2_fisher-cores", "random-cores"):
        assert width(out / "pictures" / f"{name}.png") > 300
    model, stream = build_stream(ContinualConfig.load(config), 0)
    result = ga.StreamResult.load(out / "streams" / "l2_fisher" / "seed-0-order-0")
    result.restore(model, 2)  # from the base
    assert [task.score(model) for task in stream] == result.matrix[-1]
    shown = scores_shown(out / "tensorboard" / "l2_fisher" / "seed-0-order-0")
    assert shown == [
        [(0, first), *enumerate(later, 1)] for first, *later in zip(result.baseline.scores, *result.matrix, strict=True)
    ]
    before = {p: p.stat().st_mtime_ns for p in (out / "streams").rglob("*") if p.is_file()}
    assert main(["continual", str(config), "--out", str(out)]) == 0  # finished: only read
    assert {p: p.stat().st_mtime_ns for p in before if p.name != "stream.json"}.items() <= before.items()
    assert scores_shown(out / "tensorboard" / "l2_fisher" / "seed-0-order-0") == shown  # told anew, not twice
    capsys.readouterr()
    assert main(["continual", str(continual(strategy="ewc")), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "a run of another configuration" in error
    assert "continual.yaml: strategy" in error
    assert main(["continual", str(continual(strategy="sequential")), "--out", str(out), "--overwrite"]) == 0
    assert [p.name for p in (out / "streams").iterdir()] == ["sequential"]


def test_a_command_killed_at_a_random_moment_ends_with_the_same_bits(
    continual: Callable[..., Path], killed_at_checkpoint: Callable[..., None], tmp_path: Path
) -> None:
    config = continual(compare=["random"], training={**TRAINING, "checkpoint_steps": 1})
    assert main(["continual", str(config), "--out", str(tmp_path / "whole")]) == 0
    out, moment = tmp_path / "killed", random.SystemRandom().randint(1, 12)  # of 16 checkpoints
    command = processes.start(processes.module, "gatedadapters", "continual", str(config), "--out", str(out))
    killed_at_checkpoint(command, out, moment)
    assert main(["continual", str(config), "--out", str(out)]) == 0
    for name in ("l2_fisher", "random"):
        wanted, found = (
            ga.StreamResult.load(folder / "streams" / name / "seed-0-order-0") for folder in (tmp_path / "whole", out)
        )
        assert [stage.state for stage in found.stages] == [stage.state for stage in wanted.stages], f"at {moment}"
        assert found.matrix == wanted.matrix
    assert (out / "table.txt").exists()


def test_a_run_that_was_stopped_before_anything_was_computed_goes_on(
    continual: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Reached(Exception):  # noqa: N818
        pass

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise Reached

    monkeypatch.setattr(run_continual, "run_stream", stop)
    config, out = ContinualConfig.load(continual()), tmp_path / "out"
    for left in ("pictures", "tensorboard"):
        (out / left).mkdir(parents=True)  # no configuration beside them
    with pytest.raises(Reached):
        experiments.continual(config, out)
    whole = (out / "continual.yaml").read_text()
    (out / "continual.yaml").write_text(whole[:20])
    (out / ".continual.yaml.12").write_text(whole[:20])
    with pytest.raises(Reached):
        experiments.continual(config, out)
    assert (out / "continual.yaml").read_text() == whole
    assert not list(out.glob(".*"))
    moved = tmp_path.with_name(f"{tmp_path.name} moved")  # tables and results together
    shutil.copytree(tmp_path, moved)
    (moved / "out" / "metrics.json").touch()
    with pytest.raises(Reached):
        experiments.continual(ContinualConfig.load(moved / "continual.yaml"), moved / "out")
    (out / "notes.txt").touch()
    assert main(["continual", str(continual()), "--out", str(out)]) == 2
    assert "notes.txt" in capsys.readouterr().err
    (out / "notes.txt").unlink()
    stream = out / "streams" / "l2_fisher" / "seed-0-order-0" / "stream.json"
    stream.parent.mkdir(parents=True)
    stream.touch()
    for change, key in (
        ({"tasks": [ANIMAL, {"train": "mood.csv"}]}, "tasks (order)"),
        ({"training": {**TRAINING, "steps": 4}}, "training.steps"),
        ({"strategy": {"kind": "l2_fisher", "probe": {**PROBE, "steps": 9}}}, "strategy.probe.steps"),
    ):
        assert main(["continual", str(continual(**change)), "--out", str(out)]) == 2
        assert f"continual.yaml: {key}" in capsys.readouterr().err
    (out / "continual.yaml").unlink()  # somebody's streams of an unknown configuration
    assert main(["continual", str(continual()), "--out", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err


def scores_shown(run: Path) -> list[list[tuple[int, float]]]:
    """By task, what TensorBoard shows of a finished stream of two tasks, at which step."""
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    for tag in ("R", "cores"):
        assert [event.step for event in events.Images(tag)] == [1, 2]
    assert [event.step for event in events.Scalars("metrics/op")] == [2]
    return [
        [(event.step, pytest.approx(event.value, abs=1e-6)) for event in events.Scalars(f"score/{task}")]
        for task in ("mood", "animal")
    ]


def test_files_that_strategies_name_count_from_the_configuration(continual: Callable[..., Path]) -> None:
    file = continual(strategy={"kind": "carried", "source": "small"}, compare=[{"kind": "gated", "space": "own.yaml"}])
    (file.parent / "small").mkdir()
    (file.parent / "own.yaml").write_text("version: 1\n")
    config = ContinualConfig.load(file)
    assert config.strategy == {"kind": "carried", "source": str(file.parent / "small")}
    assert config.compare == ({"kind": "gated", "space": str(file.parent / "own.yaml")},)
    preset = ContinualConfig.load(continual(strategy={"kind": "gated", "space": "attention-only"}))
    assert preset.strategy == {"kind": "gated", "space": "attention-only"}


def test_several_seeds_and_orders_give_intervals(
    continual: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = continual(strategy="sequential", orders=2, seeds=[3], keep=False)
    assert main(["continual", str(config), "--out", str(tmp_path / "out")]) == 0
    assert "mean and 95 % interval over 2 streams" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["streams"]["sequential"]
    assert [stage["task"] for stage in found[0]["stages"]] == ["mood", "animal"]


def test_questions_for_a_causal_language_model(decoder: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "answer"])
            writer.writerows([[f"the {name} dog {i}", "runs"] for i in range(12)])
    questions = [{"train": f"{name}.csv", "answer": "answer"} for name in ("first", "second")]
    data = {"model": str(decoder), "tasks": questions, "strategy": "sequential", "training": TRAINING}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(data))
    assert main(["continual", str(file), "--out", str(tmp_path / "out")]) == 0
    assert "first" in (tmp_path / "out" / "table.txt").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": [{"train": "mood.csv"}, {"train": "mood.csv"}]}, "distinct names"),
        ({"strategy": "unknown"}, "no such strategy"),
        ({"compare": [{"kind": "random", "elements": [1]}]}, "2 numbers"),
        ({"tasks": [{"train": "mood.csv"}], "strategy": "cosine"}, "two tasks or more"),
        ({"tasks": [{"train": "mood.csv", "answer": "label"}, ANIMAL]}, "answer column"),
        ({"tasks": [{"train": "mood.csv", "answer": "label"}]}, "causal language model"),
        ({"seeds": [1, 1]}, "seeds must differ"),
    ],
)
def test_bad_configurations_are_refused_before_any_compute(
    change: dict[str, Any],
    message: str,
    continual: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["continual", str(continual(**change)), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_example_configuration_validates() -> None:
    example = ContinualConfig.load(Path(__file__).parents[2] / "examples" / "continual.yaml")
    assert [task.title for task in example.tasks] == ["r8", "tweets", "rotten_tomatoes"]
    with pytest.raises(ConfigError, match="share"):
        ContinualConfig.parse(example.model_dump() | {"training": {"steps": 0}, "share": 3}, where="here")
