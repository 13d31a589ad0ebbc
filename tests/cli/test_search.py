"""A search from the command line: what it leaves, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

import gatedadapters as ga
from gatedadapters.cli import main
from gatedadapters.config import SearchConfig
from gatedadapters.experiments.evaluation import accuracies, score_tasks
from gatedadapters.experiments.task_models import load_tasks

Configured = Callable[..., Path]


def tags(folder: Path) -> set[str]:
    return set(EventAccumulator(str(folder)).Reload().Tags()["scalars"])


def test_a_search_over_two_tables_leaves_an_adapter_that_scores_what_was_printed(
    encoder: Path,
    tables: Path,
    configured: Configured,
    width: Callable[[Path], int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = configured(compare=["uniform", "random"])
    out = tables / "results"
    assert main(["search", str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert {file.name for file in out.iterdir()} == {
        *("adapter", "tensorboard", "metrics.json", "structure.png", "search.yaml", "table.txt")
    }
    metrics = json.loads((out / "metrics.json").read_text())
    searched, uniform, rival = metrics["arms"]
    assert [arm["name"] for arm in metrics["arms"]] == ["searched", "uniform LoRA", "random structure"]
    assert searched["params"] <= 0.25 * searched["dense_params"]
    for arm in (uniform, rival):
        assert 0.9 * searched["params"] <= arm["params"] <= searched["params"]
    assert (out / "table.txt").read_text() in printed
    for arm in metrics["arms"]:
        assert f"{arm['mean']:.3f}" in printed
        assert f"{arm['params']:,}" in printed

    config = SearchConfig.load(out / "search.yaml")
    assert config.as_written(tables) == SearchConfig.load(path).as_written(tables)
    tasks = load_tasks(config)
    assert [(task.name, task.n_classes) for task in tasks] == [("mood", 2), ("animal", 3)]
    model = ga.MultiTaskClassifier(AutoModel.from_pretrained(encoder), {"mood": 2, "animal": 3})
    adapters = ga.load_adapters(model, out / "adapter")
    assert adapters.structure is not None
    assert adapters.structure.params == searched["params"]
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    assert accuracies(score_tasks(model, tasks, tokenizer, 128)) == searched["accuracy"]

    assert width(out / "structure.png") > 300
    runs = {run.name: tags(run) for run in (out / "tensorboard").iterdir()}
    assert runs.keys() == {"searched", "uniform-LoRA", "random-structure"}
    assert all({"train/loss", "test/accuracy", "time/step"} <= found for found in runs.values())
    assert {"gates/target", "gates/expected_cost"} <= runs["searched"]


def test_equal_seeds_give_equal_adapters_and_the_backbone_is_never_changed(
    encoder: Path, tables: Path, configured: Configured
) -> None:
    path = configured()
    before = load_file(encoder / "model.safetensors")
    for name in ("one", "two"):
        assert main(["search", str(path), "--out", str(tables / name)]) == 0
    one, two = (load_file(tables / name / "adapter" / "adapters.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(torch.equal(value, before[k]) for k, value in load_file(encoder / "model.safetensors").items())


def test_a_single_task_on_a_causal_language_model_gets_its_classifier(
    decoder: Path, tables: Path, configured: Configured
) -> None:
    task = {"name": "mood", "train": "mood.csv", "max_train": 20, "max_test": 10}
    path = configured(model=str(decoder), tasks=[task], space="decoder-mixed", budget={"params": 900})
    assert main(["search", str(path), "--out", str(tables / "out")]) == 0
    metrics = json.loads((tables / "out" / "metrics.json").read_text())
    assert metrics["examples"] == {"mood": {"train": 20, "test": 6}}
    assert metrics["arms"][0]["params"] <= 900
    model = AutoModelForSequenceClassification.from_pretrained(decoder, num_labels=2, pad_token_id=0)
    adapters = ga.load_adapters(model, tables / "out" / "adapter")
    assert adapters.head_names == ("score.weight",)


def test_a_validation_table_stands_in_for_a_missing_test_table_and_is_named(
    tables: Path, configured: Configured, capsys: pytest.CaptureFixture[str]
) -> None:
    (tables / "held-out.csv").write_text((tables / "mood.csv").read_text())
    path = configured(tasks=[{"train": "mood.csv", "validation": "held-out.csv"}])
    assert main(["search", str(path), "--out", str(tables / "out")]) == 0
    assert "mood has no test table: its validation table stands in" in capsys.readouterr().out
    assert json.loads((tables / "out" / "metrics.json").read_text())["examples"]["mood"]["test"] == 60


# -- what is refused ---------------------------------------------------------------------------------------


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that ends with code 2, says all it should and shows no traceback."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("expected:", "got:", "where:", "fix:"):
        assert part in captured.err
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"budgt": 3}, ["ConfigError", "budgt", "search.yaml"]),
        ({"space": "encoder-mixd"}, ["ConfigError", "encoder-mixed", "lora-all-linear", "'encoder-mixd'"]),
        ({"budget": {"fraction": 2}}, ["budget.fraction", "less than or equal to 1", "got 2"]),
        ({"budget": {}}, ["exactly one of params, fraction, flops"]),
        ({"budget": {"params": 3}}, ["BudgetError", "below the smallest candidate", "at least", "3"]),
        ({"tasks": []}, ["tasks", "at least 1"]),
        ({"tasks": [{"text": "a"}]}, ["tasks.0", "train (a file) or bundled"]),
        ({"tasks": [{"train": "mood.csv"}, {"train": "mood.csv"}]}, ["distinct names", "mood, mood"]),
        ({"tasks": [{"train": "nowhere.csv"}]}, ["DataError", "no such table", "nowhere.csv"]),
        ({"tasks": [{"train": "broken.csv"}]}, ["DataError", "malformed line", "line 3"]),
        ({"tasks": [{"train": "empty.csv"}]}, ["DataError", "empty", "empty.csv"]),
        ({"tasks": [{"train": "mood.csv", "label": "mood"}]}, ["a column is missing", "'text', 'label'"]),
        ({"tasks": [{"bundled": "nonsense"}]}, ["DataError", "no such text task", "tweets"]),
        ({"model": "nowhere/model"}, ["ConfigError", "the model cannot be read", "nowhere/model"]),
        ({"model": "bundled:huge"}, ["DataError", "no such model", "minilm-l6"]),
        ({"training": {"device": "cuda"}}, ["a CUDA device", "use auto or cpu"]),
        ({"training": {"max_length": 600}}, ["at most 512 tokens", "600", "training: max_length"]),
        ({"training": {"steps": 0}}, ["training.steps", "greater than 0"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named_and_nothing_is_left(
    tables: Path,
    configured: Configured,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    says: list[str],
) -> None:
    (tables / "broken.csv").write_text("text,label\na,1\nb\n")
    (tables / "empty.csv").write_text("text,label\n")
    path = configured(**changes)
    if changes == {"training": {"device": "cuda"}} and torch.cuda.is_available():
        pytest.skip("there is one")
    before = sorted(tables.rglob("*"))
    message = refused(["search", str(path), "--out", str(tables / "out")], capsys) if _complete(changes) else ""
    if not message:
        assert main(["search", str(path), "--out", str(tables / "out")]) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
    for part in says:
        assert part in message
    assert sorted(tables.rglob("*")) == before


def _complete(changes: dict[str, object]) -> bool:
    """Whether the error comes from here; the readers of tables leave out what goes without saying."""
    return not ("tasks" in changes or str(changes.get("model", "")).startswith("bundled"))


def test_unreadable_configurations_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refused(["search", str(tmp_path / "no.yaml")], capsys)
    (tmp_path / "bad.yaml").write_text("model: [")
    assert "bad.yaml" in refused(["search", str(tmp_path / "bad.yaml")], capsys)
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    assert "list.yaml" in refused(["search", str(tmp_path / "list.yaml")], capsys)


def test_results_are_kept_unless_told_otherwise(
    tables: Path, configured: Configured, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configured(training={"steps": 2, "batch_size": 2, "precision": "fp32"})
    out = tables / "out"
    command = ["search", str(path), "--out", str(out)]
    assert main(command) == 0
    capsys.readouterr()
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    message = refused(command, capsys)
    assert "the output folder is not empty" in message
    assert "--overwrite" in message
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    data = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(data | {"budget": {"fraction": 0.5}}))
    assert main([*command, "--overwrite"]) == 0
    capsys.readouterr()
    assert ga.Structure.load(out / "adapter").budget == ga.Budget(fraction=0.5)
    (out / "thesis.tex").write_text("x")
    message = refused([*command, "--overwrite"], capsys)
    assert "thesis.tex" in message
    assert "--overwrite" not in message


def test_a_configuration_survives_being_written(configured: Configured, tmp_path: Path) -> None:
    space = ga.SearchSpace.load("encoder-mixed").with_gates(levels=("path",))
    config = SearchConfig.load(configured()).model_copy(update={"space": space})
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert SearchConfig.load(tmp_path / "again.yaml") == config


def test_paths_count_from_the_configurations_folder(
    encoder: Path, tables: Path, configured: Configured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tables / "space.yaml").write_text("paths: [{kind: scale}]\n")
    path = configured(space="space.yaml")
    monkeypatch.chdir(encoder)
    config = SearchConfig.load(path)
    assert config.tasks[0].train == str(tables / "mood.csv")
    assert config.resolved_space().paths[0].kind == "scale"
