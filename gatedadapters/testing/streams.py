"""A tiny stream of made-up tasks, and the model that learns it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gatedadapters.config import StreamTrainingConfig
from gatedadapters.continual import Task
from gatedadapters.testing.backbones import VOCABULARY, tiny
from gatedadapters.training import MultiTaskClassifier

CLASSES = {"a": 3, "b": 2, "c": 3}
"""Names of the tasks, in order, and how many classes each has."""

TRAINING = StreamTrainingConfig(
    steps=4,
    batch_size=4,
    learning_rate=1e-2,
    head_learning_rate=2e-2,
    weight_decay=0.1,
    device="cpu",
    checkpoint_steps=None,
)


class CountingCollate:
    """Makes a batch of rows of equal length, and counts the batches that it made.

    Args:
        stop_at: number of the batch that is not made: `KeyboardInterrupt` is raised in its place, as when a user stops
            the run. None: all are made.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at, self.count = stop_at, 0

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """From rows to a batch.

        Raises:
            KeyboardInterrupt: this is the batch to stop at.
        """
        self.count += 1
        if self.count == self.stop_at:
            raise KeyboardInterrupt
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def tiny_rows(task: int, classes: int, size: int, *, seed: int) -> list[dict[str, Any]]:
    """Examples of 8 tokens whose label is a function of the first token."""
    generator = torch.Generator().manual_seed(100 * seed + task)
    found = []
    for _ in range(size):
        tokens = torch.randint(3, VOCABULARY, (8,), generator=generator).tolist()
        label = (tokens[0] + task) % classes
        found.append({"input_ids": tokens, "attention_mask": [1] * 8, "labels": label, "task_ids": task})
    return found


def tiny_tasks(collate: CountingCollate | None = None) -> list[Task]:
    """Three classification tasks of 12 training and 10 held-out examples, which share one `collate`."""
    collate = collate or CountingCollate()
    return [
        Task(
            name=name,
            train=tiny_rows(index, width, 12, seed=0),
            held_out=tiny_rows(index, width, 10, seed=1),
            collate=collate,
            classes=tuple("xyz"[:width]),
            heads=(f"heads.{name}",),
        )
        for index, (name, width) in enumerate(CLASSES.items())
    ]


def tiny_classifier(*, dropout: float = 0.1, seed: int = 0) -> MultiTaskClassifier:
    """A tiny BERT with a head for each of `tiny_tasks`."""
    backbone, _ = tiny("bert", seed=seed)
    backbone.add_module("pooler", None)  # no task reads it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MultiTaskClassifier(backbone, CLASSES, dropout=dropout)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    model.train(False)
    return model
