"""A tokenizer with a chat template, tiny models and made-up conversations for the trainers of TRL."""

from __future__ import annotations

from typing import Any

from recipes import SPACE, with_dropout
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import gatedadapters as ga
from gatedadapters.testing import tiny

SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]")
WORDS = ("what", "is", "the", "colour", "of", "sky", "sea", "grass", "blue", "green", "red", "user", "assistant")
KNOWN = {word: number for number, word in enumerate((*SPECIAL, *WORDS, "?", ".", ":"))}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : "
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }} [EOS]{% endgeneration %} "
    "{% else %}{{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)
ANSWERS = {"sky": "blue", "sea": "blue", "grass": "green"}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    backend = Tokenizer(WordLevel(KNOWN, unk_token="[UNK]"))
    backend.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True)),
    )
    made.chat_template = TEMPLATE
    return made


def backbone(head: str = "lm", **config: Any) -> Any:
    """A tiny Llama with that vocabulary, nothing attached; the same on every call."""
    model, _ = tiny("llama", head=head, vocab_size=len(KNOWN), pad_token_id=0, bos_token_id=1, eos_token_id=2, **config)
    return with_dropout(model, 0.0)


def gated_model(head: str = "lm", *, space: Any = SPACE, **config: Any) -> Any:
    """The same with adapters."""
    model = backbone(head, **config)
    ga.attach(model, space)
    return model


def _question(thing: str) -> str:
    return f"what is the colour of the {thing} ?"


def completions(size: int = 24) -> list[dict[str, Any]]:
    """Questions with answers."""
    things = list(ANSWERS)
    return [
        {"prompt": _question(thing), "completion": f" {ANSWERS[thing]} ."}
        for thing in (things[number % 3] for number in range(size))
    ]


def conversations(size: int = 24) -> list[dict[str, Any]]:
    """The same as messages, some with two rounds."""
    found = []
    for number, row in enumerate(completions(size)):
        rounds = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"].strip()},
        ]
        found.append({"messages": rounds * (1 + number % 2)})
    return found


def preferences(size: int = 24) -> list[dict[str, Any]]:
    """Questions, each with a right answer and a wrong one."""
    return [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " red ."} for row in completions(size)]
