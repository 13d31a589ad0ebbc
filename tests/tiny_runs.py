"""Tiny pretrained models in folders and made-up labelled tables: what tests of runs and of commands start from."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["the", "film", "was", "good", "bad", "long", "short", "and", "very", "dog", "cat", "runs", "sleeps", "today"]


def save_tokenizer(folder: Path) -> int:
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers, as `from_pretrained` reads it."""
    folder = tmp_path_factory.mktemp("models") / "encoder"
    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers."""
    folder = tmp_path_factory.mktemp("models") / "decoder"
    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A folder with mood.csv (two classes) and animal.jsonl (three)."""
    generator = torch.Generator().manual_seed(0)

    def words(*extra: str) -> str:
        chosen = [WORDS[i] for i in torch.randint(0, 3, (5,), generator=generator).tolist()]
        place = int(torch.randint(0, 6, (1,), generator=generator))
        number = int(torch.randint(0, 10**6, (1,), generator=generator))
        return " ".join([*chosen[:place], *extra, *chosen[place:], str(number)])

    with (tmp_path / "mood.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows([words("good"), "happy"] if i % 2 else [words("bad"), "sad"] for i in range(60))
    kinds = [("dog", "runs"), ("cat", "sleeps"), ("cat", "dog")]
    lines = [json.dumps({"line": words(*kinds[i % 3]), "kind": i % 3}) for i in range(60)]
    (tmp_path / "animal.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def configured(tables: Path, encoder: Path) -> Callable[..., Path]:
    """Writes search.yaml beside the tables; takes what is to differ."""

    def write(**changes: object) -> Path:
        data: dict[str, object] = {
            "model": str(encoder),
            "tasks": [
                {"train": "mood.csv"},
                {"name": "animal", "train": "animal.jsonl", "text": "line", "label": "kind"},
            ],
            "space": "encoder-mixed",
            "budget": {"fraction": 0.25},
            "training": {"steps": 6, "batch_size": 4, "precision": "fp32", "device": "cpu"},
        }
        path = tables / "search.yaml"
        path.write_text(yaml.safe_dump(data | changes))
        return path

    return write


@pytest.fixture
def width() -> Callable[[Path], int]:
    """Of an image file, in pixels."""

    def measure(file: Path) -> int:
        with Image.open(file) as image:
            return image.size[0]

    return measure
