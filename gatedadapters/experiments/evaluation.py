"""Accuracy of a classifier by task, and that of the most frequent class as a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gatedadapters.data import MixedTaskCollator, TextTask
from gatedadapters.robustness import Corruption, Vocabulary, corrupted_dataset


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tasks: Sequence[TextTask],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    split: str = "test",
    batch_size: int = 64,
    bf16: bool = False,
    perturbation: Corruption | None = None,
    vocabulary: Vocabulary | None = None,
) -> dict[str, float]:
    """Accuracy by task, in evaluation mode.

    Examples are sorted by length, because batches of texts of similar length need little padding.

    Args:
        model: a model that takes a batch with `task_ids` and returns logits, shape (batch, classes).
        tasks: the tasks, in the order of their ids.
        tokenizer: the tokenizer of the model.
        max_length: tokens after which a text is cut.
        split: the split of every task to evaluate on.
        batch_size: texts in a batch.
        bf16: whether to run under bf16 autocast.
        perturbation: a perturbation of the texts; None leaves them as they are.
        vocabulary: the words that a perturbation draws from. Default: those of the tokenizer.

    Raises:
        DataError: a task lacks the split.
    """
    vocabulary = vocabulary or Vocabulary.of(tokenizer)
    data = corrupted_dataset(tasks, tokenizer, split, max_length, perturbation, vocabulary)
    collate = MixedTaskCollator(tokenizer)
    device = next(model.parameters()).device
    order = sorted(range(len(data)), key=lambda index: len(data[index]["input_ids"]))
    right = torch.zeros(len(tasks), dtype=torch.long)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            batch = collate([data[index] for index in order[start : start + batch_size]])
            labels = batch.pop("labels")
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(**{key: value.to(device) for key, value in batch.items()}).logits
            right.index_add_(0, batch["task_ids"], (logits.argmax(-1).cpu() == labels).long())
    finally:
        model.train(was_training)
    return {task.name: int(hits) / size for task, hits, size in zip(tasks, right, data.sizes, strict=True)}


def majority_accuracy(tasks: Sequence[TextTask]) -> dict[str, float]:
    """Accuracy on test data, by task, of always naming the most frequent class of the training data."""
    result = {}
    for task in tasks:
        frequent = max(set(task.train.labels), key=task.train.labels.count)
        labels = task.split("test").labels
        result[task.name] = labels.count(frequent) / len(labels)
    return result
