"""`gatedadapters select`: one command from a configuration to a tuned delta and a report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

import gatedadapters as ga
from gatedadapters.cli.main import main
from gatedadapters.config import SelectConfig
from gatedadapters.errors import ConfigError


@pytest.fixture
def config(decoder: Path, tmp_path: Path) -> Path:
    general = ["the dog runs and the cat sleeps today", "the film was very long", "the cat runs"] * 4
    (tmp_path / "general.txt").write_text("\n\n".join(f"{text} {i}" for i, text in enumerate(general)))
    with (tmp_path / "domain.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer"])
        writer.writerows([["the film was good", f"long and {i} very short"] for i in range(12)])
    data = {
        "model": str(decoder),
        "general": {"train": "general.txt"},
        "domain": {"train": "domain.csv", "text": "question", "answer": "answer"},
        "selection": {"protect": 0.9, "batches": 2, "exclude": ["norm"]},
        "training": {"steps": 8, "batch_size": 4, "max_length": 16, "learning_rate": 0.02, "device": "cpu"},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


def test_one_command_tunes_what_is_free_and_reports_both_sides(
    config: Path, decoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["select", str(config), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "domain" in printed
    assert "general" in printed
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["after"]["domain"] < metrics["before"]["domain"]
    assert "embedding" in (out / "report.txt").read_text()
    model = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    delta = ga.load_delta(model, out / "delta")
    assert delta.params == metrics["free"]
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert {"mask/up", "train/loss"} <= set(events.Tags()["scalars"])
    assert main(["select", str(config), "--out", str(out)]) == 2
    assert "not empty" in capsys.readouterr().err
    logs = set((out / "tensorboard").iterdir())
    assert main(["select", str(config), "--out", str(out), "--overwrite"]) == 0
    assert not logs & set((out / "tensorboard").iterdir())  # those of one run only
    (out / "notes.txt").write_text("mine")
    assert main(["select", str(config), "--out", str(out), "--overwrite"]) == 2
    assert "notes.txt" in capsys.readouterr().err


def test_texts_longer_than_the_model_reads_are_refused(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = yaml.safe_load(config.read_text())
    data["training"]["max_length"] = 5000
    config.write_text(yaml.safe_dump(data))
    assert main(["select", str(config), "--out", str(tmp_path / "out")]) == 2
    assert "at most 2048 tokens" in capsys.readouterr().err


def test_a_model_that_is_no_causal_one_is_refused(
    config: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"model": str(encoder)}))
    assert main(["select", str(config), "--out", str(tmp_path / "out")]) == 2
    assert "causal" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_example_configuration_validates() -> None:
    example = SelectConfig.load(Path(__file__).parents[2] / "examples" / "select.yaml")
    assert example.domain.answer == "answer"
    with pytest.raises(ConfigError, match="protect"):
        SelectConfig.parse(example.model_dump() | {"selection": {"protect": 1.0}}, where="here")
    with pytest.raises(ConfigError, match=r"either train .* or bundled"):
        SelectConfig.parse(example.model_dump() | {"domain": {}}, where="here")


def test_a_configuration_of_0_1_that_says_core_still_loads_and_names_the_new_key(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "examples" / "select.yaml").read_text()
    (tmp_path / "old.yaml").write_text(text.replace("protect: 0.95", "core: 0.8"))
    with pytest.warns(FutureWarning, match="protect"):
        old = SelectConfig.load(tmp_path / "old.yaml")
    assert old.selection.protect == 0.8
    assert "core" not in old.as_written()["selection"]
    with pytest.warns(DeprecationWarning, match="protect"):
        assert old.selection.core == 0.8
    with pytest.raises(ConfigError, match="drop core"):
        SelectConfig.parse(old.model_dump() | {"selection": {"protect": 0.8, "core": 0.8}}, where="here")
