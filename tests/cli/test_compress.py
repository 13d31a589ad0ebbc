"""`gatedadapters compress`: a smaller LoRA within the budget, its scores true, wrong input refused before any work."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import gatedadapters as ga
from gatedadapters.cli import main

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def lora(tmp_path: Path, encoder: Path) -> Path:
    """A LoRA of random weights that peft saved for a classifier of two classes."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value", "output.dense"])
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.2)
    wrapped.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.fixture
def arguments(lora: Path, tables: Path, tmp_path: Path) -> list[str]:
    with (tables / "mood.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    with (tables / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows[:30]])
    fixed = ["--train", str(tables / "mood.csv"), "--test", str(tables / "test.csv"), "--out", str(tmp_path / "out")]
    return [
        "compress",
        str(lora),
        *fixed,
        "--steps",
        "6",
        "--batch-size",
        "4",
        "--precision",
        "fp32",
        "--device",
        "cpu",
    ]


def accuracy_by_peft(encoder: Path, folder: Path, table: Path, classes: list[str]) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=len(classes))
    wrapped = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with torch.no_grad():
        batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        found = wrapped(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    return sum(classes[int(i)] == row["label"] for i, row in zip(found, rows, strict=True)) / len(rows)


@pytest.mark.parametrize("classes", [["happy", "sad"], ["sad", "happy"]])
def test_the_smaller_lora_keeps_the_budget_and_scores_what_peft_says(
    tmp_path: Path,
    encoder: Path,
    lora: Path,
    tables: Path,
    arguments: list[str],
    classes: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*arguments, "--budget", "0.25", "--classes", *classes]) == 0
    out = tmp_path / "out"
    metrics = json.loads((out / "metrics.json").read_text())
    given, truncated, compressed = metrics["arms"]
    whole = sum(v.numel() for n, v in load_file(lora / WEIGHTS).items() if "lora_" in n)
    small = sum(v.numel() for n, v in load_file(out / "peft" / WEIGHTS).items() if "lora_" in n)
    assert given["params"] == whole
    assert 0 < compressed["params"] == small <= whole / 4
    assert 0 < truncated["params"] <= whole / 4
    assert compressed["bytes"] == (out / "peft" / WEIGHTS).stat().st_size < given["bytes"]
    for arm, folder in ((given, lora), (compressed, out / "peft")):
        assert arm["accuracy"] == accuracy_by_peft(encoder, folder, tables / "test.csv", classes)
    assert ga.Structure.load(out / "adapter").params == small
    printed = capsys.readouterr().out
    assert f"0 = {classes[0]}, 1 = {classes[1]}" in printed
    for name in ("as given", "SVD truncation", "compressed", "most frequent class"):
        assert name in printed
    assert (out / "table.txt").read_text().strip() in printed


def test_the_budget_may_be_a_number_of_parameters_and_results_are_replaced_on_request(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("{}")
    assert main([*arguments, "--budget", "500"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main([*arguments, "--budget", "500", "--overwrite"]) == 0
    assert 0 < json.loads((tmp_path / "out" / "metrics.json").read_text())["arms"][-1]["params"] <= 500


def edited(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def an_ia3(folder: Path) -> None:
    config = {"peft_type": "IA3", "target_modules": ["query"], "feedforward_modules": [], "task_type": "SEQ_CLS"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.ia3_l"
    save_file({name: torch.ones(32, 1)}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "extra", "says"),
    [
        (an_ia3, [], ["ranks of a plain LoRA", "IA3", "import_peft"]),
        (edited(task_type="CAUSAL_LM"), [], ["SEQ_CLS", "CAUSAL_LM", "import_peft"]),
        (edited(base_model_name_or_path=None), [], ["no base model is named", "--model"]),
        (edited(use_dora=True), [], ["use_dora"]),
        (edited(), ["--classes", "good", "bad"], ["not the classes of the table", "happy, sad", "good, bad"]),
        (edited(), ["--budget", "much"], ["--budget much"]),
        (edited(), ["--steps", "0"], ["steps", "greater than 0"]),
        (
            edited(),
            ["--train", "animal.jsonl", "--text", "line", "--label", "kind"],
            ["heads are not those", "classifier", "(3,"],
        ),
    ],
)
def test_what_cannot_be_compressed_is_refused_and_nothing_written(
    tmp_path: Path,
    lora: Path,
    tables: Path,
    arguments: list[str],
    change: Callable[[Path], None],
    extra: list[str],
    says: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(lora)
    monkeypatch.chdir(tables)
    if "animal.jsonl" in extra:
        extra = [*extra, "--test", "animal.jsonl"]
    assert main([*arguments, "--budget", "0.25", *extra]) == 2
    error = capsys.readouterr().err
    for part in says:
        assert part in error
    assert not (tmp_path / "out").exists()
