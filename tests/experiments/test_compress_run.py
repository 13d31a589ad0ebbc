"""A compression from Python: what it returns, and where the paths of its file count from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import gatedadapters as ga
from gatedadapters import experiments
from gatedadapters.config import CompressConfig
from gatedadapters.data import Examples, TextTask
from gatedadapters.experiments.run_compress import with_classes_in_order

pytest.importorskip("peft")


@pytest.fixture
def lora(tables: Path, encoder: Path) -> Path:
    """A LoRA of random weights for a classifier of two classes."""
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"]))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.2)
    wrapped.save_pretrained(tables / "lora")
    return tables / "lora"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_a_compression_is_run_from_a_file_whose_paths_count_from_its_folder(
    lora: Path, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {
        "lora": "lora",
        "budget": {"fraction": 0.5},
        "task": {"train": "mood.csv"},
        "classes": ["sad", "happy"],
        "training": {"steps": 3, "batch_size": 4, "precision": "fp32", "device": "cpu"},
    }
    (tables / "small.yaml").write_text(yaml.safe_dump(data))
    (tables / "elsewhere").mkdir()
    monkeypatch.chdir(tables / "elsewhere")
    result = experiments.compress(tables / "small.yaml", out=tables / "out")
    assert result.config == CompressConfig.load(tables / "small.yaml")
    assert result.task.classes == ("sad", "happy")
    assert result.compressed.structure.params <= result.given.structure.params / 2
    assert result.truncated.structure.params <= result.given.structure.params / 2
    assert ga.Structure.load(tables / "out" / "adapter") == result.compressed.structure
    metrics = json.loads((tables / "out" / "metrics.json").read_text())
    assert [arm["accuracy"] for arm in metrics["arms"]] == [arm.mean for arm, _ in result.arms]
    assert metrics["lora"] == "lora"  # as the file names it, the same on every machine
    assert metrics["config"]["tasks"][0]["train"] == "mood.csv"
    assert (tables / "out" / "table.txt").read_text() == result.table() + "\n"
    assert "0 = sad, 1 = happy" in str(result)


def test_the_order_of_the_outputs_changes_numbers_and_no_meaning() -> None:
    def named(task: TextTask, examples: Examples) -> list[str]:
        return [task.classes[label] for label in examples.labels]

    examples = Examples(["a", "b", "c"], [0, 2, 1])
    task = TextTask("mood", examples, examples, None, ("calm", "happy", "sad"))
    turned = with_classes_in_order(task, ("sad", "calm", "happy"))
    assert turned.classes == ("sad", "calm", "happy")
    assert named(turned, turned.train) == named(turned, turned.validation) == ["calm", "sad", "happy"]
    assert turned.test is None
    assert with_classes_in_order(task, None) is task
