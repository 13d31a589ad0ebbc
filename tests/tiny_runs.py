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
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.trainers import BpeTrainer
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["the", "film", "was", "good", "bad", "long", "short", "and", "very", "dog", "cat", "runs", "sleeps", "today"]


def save_tokenizer(folder: Path) -> int:
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, and of the words of the tables below, with a chat template."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    special, letters = ["<pad>", "<s>", "</s>"], ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=letters, show_progress=False)
    backend.train_from_iterator(["system user assistant", *(f" {word}" for word in WORDS)] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session")
def chat_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with chat.jsonl, questions.csv, choices.jsonl and story.txt: which animal does what."""
    does = {"dog": "runs", "cat": "sleeps"}
    rows = [(f"what does the {animal} {number}", verb) for number in range(12) for animal, verb in does.items()]
    chats = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in rows]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    with (tmp_path / "questions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *rows])
    choices = [{"text": q, "options": ["runs", "sleeps"], "label": a} for q, a in rows]
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, choices)))
    (tmp_path / "story.txt").write_text("\n\n".join(f"{q} and it {a} today" for q, a in rows))
    return tmp_path


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
