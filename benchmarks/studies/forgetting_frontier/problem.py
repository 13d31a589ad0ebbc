"""The problem: a model, text to learn, text to keep, and how both are measured."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.studies.forgetting.problems import choice_scores, stream
from benchmarks.studies.placement.precision import autocast
from gatedadapters.data.bundled import load_choices, load_corpus, load_smollm2
from gatedadapters.data.language import LanguageCollator, LanguageDataset, Passage, split_examples

BATCH, BLOCK = 4, 128  # blocks a step, tokens of a block
HELD_OUT = 32  # blocks of each kind of text
QUESTIONS = 100
CORPORA = {"indonesian": "quran_indonesian", "chinese": "chinese_reviews"}
GENERAL = {"news": "xsum", "fiction": "grimm"}
Batch = dict[str, Tensor]
Batches = Callable[[int], Iterator[Batch]]


@dataclass
class Problem:
    """A model and its texts, loaded once for all cells of a process.

    Attributes:
        model: SmolLM2-135M.
        domain, general: endless batches to learn from, and of what is to be kept, by seed.
        held_out: batches of each kind of text that nothing is learned from; the same for all seeds.
        choices: accuracy and loss on questions that are asked in general.
        start: the pretrained weights, read again when they are needed: a copy of them would take as much memory as the
            model.
    """

    model: nn.Module
    domain: Batches
    general: Batches
    held_out: dict[str, list[Batch]]
    choices: Callable[[], dict[str, float]]
    start: Callable[[], dict[str, Tensor]]

    def freeze(self) -> None:
        """No parameter requires a gradient or holds one."""
        self.model.requires_grad_(False)
        self.model.zero_grad(set_to_none=True)

    def restore(self) -> None:
        """Put the pretrained weights back."""
        self.freeze()
        self.model.load_state_dict(self.start())

    @torch.no_grad()
    def measured(self) -> dict[str, float]:
        """The loss per token of held-out text, by kind. Blocks are equally long."""
        self.model.eval()
        found = {}
        for kind, batches in self.held_out.items():
            sizes = [len(batch["input_ids"]) for batch in batches]
            with autocast():
                losses = [float(self.model(**batch).loss) for batch in batches]
            found[kind] = sum(map(operator.mul, losses, sizes)) / sum(sizes)
        return found


@functools.cache
def problem_of(domain: str) -> Problem:
    """SmolLM2 that learns a domain and shall keep its English."""
    model, tokenizer = load_smollm2()
    collate = LanguageCollator(tokenizer)
    sides = {kind: _sides(name, tokenizer) for kind, name in {"domain": CORPORA[domain], **GENERAL}.items()}
    english = [sides[kind][0] for kind in GENERAL]
    shared = min(map(len, english))  # as much of each
    general = [data[i] for i in range(shared) for data in english]
    held_out = {kind: _spread(side, collate) for kind, (_, side) in sides.items()}
    task = load_choices("commonsenseqa", train=0, validation=0, test=QUESTIONS, seed=0)

    def choices() -> dict[str, float]:
        accuracy, loss = choice_scores(model, tokenizer, task.split("test"))
        return {"accuracy": accuracy, "loss": loss}

    model.requires_grad_(False)
    return Problem(
        model,
        stream(sides["domain"][0], collate, BATCH),
        stream(general, collate, BATCH),
        held_out,
        choices,
        start=lambda: load_smollm2()[0].state_dict(),
    )


def _sides(corpus: str, tokenizer: Any) -> tuple[LanguageDataset, LanguageDataset]:
    """Text to learn from, and held-out text; whole documents lie on one side."""
    passages = [Passage(text) for text in load_corpus(corpus)[:4000]]
    learned, held_out = split_examples(passages, 0.15, seed=0)
    return LanguageDataset(learned, tokenizer, BLOCK), LanguageDataset(held_out, tokenizer, BLOCK)


def _spread(data: LanguageDataset, collate: Any) -> list[Batch]:
    """Batches of blocks that are spread over held-out text; the last block, which may be short, is left out."""
    blocks: Sequence[Any] = [data[int(i)] for i in np.unique(np.linspace(0, len(data) - 2, HELD_OUT).astype(int))]
    return [collate(blocks[i : i + BATCH]) for i in range(0, len(blocks), BATCH)]
