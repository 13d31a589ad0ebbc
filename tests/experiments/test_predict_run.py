"""What a run saved is loaded again and predicts, by the names in its folder alone."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModel, AutoModelForSequenceClassification

import gatedadapters as ga
from gatedadapters import experiments
from gatedadapters.cli import main
from gatedadapters.errors import ArtifactError, ConfigError, TaskError
from gatedadapters.structure.folder import read_origin
from gatedadapters.testing.backbones import tiny

Configured = Callable[..., Path]


def run(config: Path, out: Path) -> Path:
    assert main(["search", str(config), "--out", str(out)]) == 0
    return out


@pytest.fixture
def searched(tables: Path, configured: Configured) -> Path:
    """The folder of a search over two tables, of which the first has labels in words."""
    return run(configured(), tables / "out")


def test_a_new_process_predicts_the_labels_of_the_table(searched: Path, tmp_path: Path) -> None:
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text",), ("the film was good",), ("the film was bad",)])
    loaded = ga.load(searched)
    expected = loaded.predict(["the film was good", "the film was bad"])
    command = [sys.executable, "-m", "gatedadapters", "predict", str(searched / "adapter"), "--json"]
    command += ["--table", "new.csv", "--column", "text"]  # the second table named it otherwise
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["label"] for row in rows] == [row.answer for row in expected]
    for row, known in zip(rows, expected, strict=True):
        assert row["probabilities"] == pytest.approx(known.probabilities)
        assert set(row["probabilities"]) == set(loaded.labels[row["task"]])
        assert sum(row["probabilities"].values()) == pytest.approx(1)


def test_a_column_that_the_table_lacks_is_named_with_the_option_that_helps(
    searched: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "new.csv"
    table.write_text("review\na good film\n")
    command = ["predict", str(searched), "--task", "animal", "--table", str(table)]
    assert main(command) == 2
    assert "say which column it is with --column, or text=" in capsys.readouterr().err
    assert main([*command, "--column", "review"]) == 0


def test_a_prediction_is_the_softmax_of_the_head_and_equals_the_pipelines(searched: Path) -> None:
    loaded = ga.load(searched)
    found = loaded.predict(["the film was very good"], task="animal").rows[0]
    batch = loaded.tokenizer("the film was very good", return_tensors="pt")
    with torch.no_grad():
        logits = loaded.model(**batch, task_ids=torch.tensor([1])).logits[0, : len(loaded.labels["animal"])]
    expected = dict(zip(loaded.labels["animal"], logits.softmax(-1).tolist(), strict=True))
    assert found.probabilities == pytest.approx(expected)
    said = loaded.pipeline("animal")("the film was very good")[0]
    assert said == {"label": found.answer, "score": pytest.approx(found.probability)}


def test_the_folder_of_the_run_is_as_good_as_that_of_the_adapter(
    searched: Path, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    structure, origin = read_origin(searched)
    assert origin is not None
    assert origin.base_model_name_or_path == str(encoder)
    assert origin.training["steps"] > 0
    classes = {task.name: task.labels for task in origin.tasks}
    model = ga.MultiTaskClassifier(AutoModel.from_pretrained(encoder), classes)
    assert ga.load_adapters(model, searched).structure == structure
    capsys.readouterr()
    assert main(["show", str(searched)]) == 0
    assert f"base        {encoder}" in capsys.readouterr().out
    assert main(["report", str(searched)]) == 2
    told = capsys.readouterr().err
    assert "a search, not a study" in told
    assert "gatedadapters show" in told


def test_a_report_on_a_run_that_is_not_finished_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out" / "tensorboard").mkdir(parents=True)
    assert main(["report", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "a search, not a study" in told
    assert "let it finish" in told


def test_a_language_model_chooses_the_label_of_the_highest_mean_log_probability(
    decoder: Path, tables: Path, configured: Configured
) -> None:
    task = {"name": "mood", "train": "mood.csv", "kind": "choice"}
    loaded = ga.load(run(configured(model=str(decoder), tasks=[task], space="lora-all-linear"), tables / "out"))
    tokenizer, scores = loaded.tokenizer, []
    question = tokenizer("Question: the film was good\nAnswer:", add_special_tokens=False)["input_ids"]
    for label in loaded.labels["mood"]:
        answer = tokenizer(f" {label}", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([question + answer])).logits[0].log_softmax(-1)
        scores.append(logits[len(question) - 1 : -1].gather(1, torch.tensor(answer)[:, None]).mean())
    expected = torch.stack(scores).softmax(0)
    found = loaded.predict(["the film was good"]).rows[0]
    assert found.answer == loaded.labels["mood"][int(expected.argmax())]
    shares = [found.probabilities[label] for label in loaded.labels["mood"]]
    torch.testing.assert_close(torch.tensor(shares), expected, atol=1e-5, rtol=1e-4)


def test_a_language_model_answers_in_words(decoder: Path, tables: Path, configured: Configured) -> None:
    task = {"name": "mood", "train": "mood.csv", "kind": "text", "answer": "label"}
    config = configured(model=str(decoder), tasks=[task], space="decoder-mixed")
    loaded = ga.load(run(config, tables / "out"))
    found = loaded.predict(["the film was good"], max_new_tokens=3).rows[0]
    assert found.probability is None
    assert isinstance(found.answer, str)
    assert loaded.pipeline()("the film was", max_new_tokens=2, do_sample=False)[0]["generated_text"]


def test_what_cannot_be_predicted_is_refused(searched: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="mood, animal"):
        ga.load(searched).predict(["the film"], task="weather")
    with pytest.raises(ConfigError, match="either texts or a table"):
        experiments.predict(searched)
    with pytest.raises(ArtifactError, match="no such folder"):
        ga.load(tmp_path / "nowhere")
    (tmp_path / "unfinished" / "tensorboard").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="has not saved an adapter yet"):
        ga.load(tmp_path / "unfinished")
    model = ga.MultiTaskClassifier(tiny("bert")[0], {"mood": 2})
    adapters = ga.attach(model, "encoder-mixed", tasks=("mood",))
    adapters.compact()
    adapters.save(tmp_path / "plain")
    with pytest.raises(ArtifactError, match="do not name their base"):
        ga.load(tmp_path / "plain")


def test_a_moved_base_is_named_by_hand(searched: Path, encoder: Path, tmp_path: Path) -> None:
    place = searched / "adapter" / "structure.json"
    data = json.loads(place.read_text())
    del data["digests"]
    data["origin"]["base_model_name_or_path"] = data["origin"]["tokenizer"] = "moved/elsewhere"
    place.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="--model on the command line"):
        ga.load(searched)
    assert len(ga.load(searched, model=str(encoder)).predict(["the film"])) == 2


@pytest.mark.parametrize(
    ("space", "requires", "says"),
    [
        ("encoder-mixed", ["merge"], "cannot be merged into weights"),
        ("encoder-mixed", ["peft"], "no peft adapter holds together"),
    ],
)
def test_a_space_that_cannot_do_what_is_required_is_refused_before_the_search(
    tables: Path, configured: Configured, space: str, requires: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", str(configured(space=space, requires=requires)), "--out", str(tables / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tables / "out").exists()


def test_a_space_of_lora_can_be_merged_and_exported(tables: Path, configured: Configured) -> None:
    config = configured(space="lora-all-linear", requires=["merge", "peft"])
    run(config, tables / "out")
    assert yaml.safe_load((tables / "out" / "search.yaml").read_text())["requires"] == ["merge", "peft"]


# -- the classifier ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_classifier_is_saved_and_loaded_as_any_model_of_transformers(family: str, tmp_path: Path) -> None:
    backbone = AutoModel.from_config(tiny(family)[0].config)
    model = ga.MultiTaskClassifier(backbone, {"zeal": ("no", "yes"), "animal": 3}, pooling="first").eval()
    ids, task_ids = torch.randint(3, 20, (2, 6)), torch.tensor([0, 1])
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert isinstance(again, ga.MultiTaskClassifier)
    assert again.labels == {"zeal": ("no", "yes"), "animal": ("LABEL_0", "LABEL_1", "LABEL_2")}
    with torch.no_grad():
        both = [m(input_ids=ids, task_ids=task_ids).logits for m in (model, again)]
    torch.testing.assert_close(*both)


def test_set_task_serves_the_classifier_and_its_adapters_from_either_side() -> None:
    model = ga.MultiTaskClassifier(tiny("bert")[0], {"mood": ("sad", "happy"), "animal": 3}).eval()
    adapters = ga.attach(model, "encoder-mixed", tasks=("mood", "animal"))
    ids = torch.randint(3, 20, (2, 6))
    with pytest.raises(TaskError, match="several tasks"):
        model(input_ids=ids)
    with torch.no_grad():
        adapters.set_task("mood")
        assert model(input_ids=ids).logits.shape == (2, 2)
        assert model.config.id2label == {0: "sad", 1: "happy"}
        model.set_task("animal")
        expected = model(input_ids=ids, task_ids=torch.tensor([1, 1])).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
    adapters.set_task(None)
    assert model.task is None
