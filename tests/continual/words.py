"""A tokenizer of a few words."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

WORDS = [
    "the",
    "film",
    "was",
    "good",
    "bad",
    "long",
    "dog",
    "cat",
    "runs",
    "sleeps",
    "today",
    "Question",
    "Answer",
    ":",
]


def save_tokenizer(folder: Path) -> None:
    """Write it."""
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
