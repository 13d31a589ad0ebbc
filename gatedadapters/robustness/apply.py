"""Corrupting what is at hand: tasks, data sets, batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from gatedadapters.data import Examples, MixedTaskDataset, TextTask
from gatedadapters.errors import ConfigError
from gatedadapters.robustness.base import Corruption, Feature, TextPerturbation, TokenPerturbation, Vocabulary
from gatedadapters.robustness.noises import LabelNoise


class CorruptedDataset(Dataset[dict[str, Any]]):
    """A data set of tokenised examples, perturbed: each item always in the same way, in whatever order it is read.

    Args:
        dataset: of features with `input_ids`.
        corruption: of tokens.
        vocabulary: of the tokenizer that the features are from.

    Raises:
        ConfigError: the corruption is not one of tokens.
    """

    def __init__(self, dataset: Any, corruption: Corruption, vocabulary: Vocabulary) -> None:
        if not isinstance(corruption, TokenPerturbation):
            raise cannot(corruption, "tokenised examples", "corrupt_tasks (texts, labels) or NoiseCallback")
        self.dataset, self.corruption, self.vocabulary = dataset, corruption, vocabulary

    @property
    def sizes(self) -> list[int]:
        """Examples per task, of a data set that has several."""
        sizes: list[int] = self.dataset.sizes
        return sizes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.corruption.feature(self.dataset[index], self.vocabulary, index)


def corrupt_tasks(tasks: Sequence[TextTask], corruption: Corruption, split: str) -> list[TextTask]:
    """The same tasks with one split corrupted.

    Raises:
        ConfigError: the corruption is not one of texts or labels.
        DataError: a task lacks the split.
    """
    result = []
    for position, task in enumerate(tasks):
        examples = task.split(split)
        if isinstance(corruption, TextPerturbation):
            changed = corruption.examples(examples)
        elif isinstance(corruption, LabelNoise):
            labels = corruption.labels(examples.labels, task.n_classes, position)
            changed = Examples(examples.texts, labels, examples.pairs)
        else:
            raise cannot(corruption, "texts and labels", "CorruptedDataset (tokens) or NoiseCallback")
        parts: dict[str, Any] = {split: changed}
        result.append(replace(task, **parts))
    return result


def corrupted_dataset(
    tasks: Sequence[TextTask],
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    max_length: int,
    corruption: Corruption | None,
    vocabulary: Vocabulary,
) -> MixedTaskDataset | CorruptedDataset:
    """One split of several tasks, tokenised, and corrupted in texts, labels or tokens; other noise leaves data alone.

    Raises:
        DataError: there is no task, or a task lacks the split.
    """
    if isinstance(corruption, (TextPerturbation, LabelNoise)):
        tasks = corrupt_tasks(tasks, corruption, split)
    dataset = MixedTaskDataset(tasks, tokenizer, split, max_length)
    if isinstance(corruption, TokenPerturbation):
        return CorruptedDataset(dataset, corruption, vocabulary)
    return dataset


def corrupt_batch(
    batch: Mapping[str, Tensor], corruption: Corruption, vocabulary: Vocabulary, *, pad: int = 0, key: int = 0
) -> dict[str, Tensor]:
    """A padded batch with its tokens perturbed, padded anew on the side on which it was.

    Args:
        batch: `input_ids` and `attention_mask` (batch, length), other columns of that shape, and whatever else.
        corruption: of tokens.
        vocabulary: of the tokenizer that the batch is from.
        pad: the padding token's id.
        key: makes batches differ in what is chosen; say, the number of the batch.

    Raises:
        ConfigError: the corruption is not one of tokens.
    """
    if not isinstance(corruption, TokenPerturbation):
        raise cannot(corruption, "batches", "corrupt_tasks (texts, labels) or NoiseCallback")
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    columns = {name: value for name, value in batch.items() if value.shape == ids.shape}
    left = bool((~mask[:, 0]).any())
    rows = []
    for index, where in enumerate(mask):
        feature: Feature = {name: value[index][where].tolist() for name, value in columns.items()}
        rows.append(corruption.feature(feature, vocabulary, key * len(ids) + index))
    length = max(len(row["input_ids"]) for row in rows)
    result = dict(batch)
    for name, value in columns.items():
        fill = {"input_ids": pad, "labels": -100}.get(name, 0)
        padded = [
            [fill] * (length - len(row[name])) + row[name] if left else row[name] + [fill] * (length - len(row[name]))
            for row in rows
        ]
        result[name] = torch.tensor(padded, dtype=value.dtype, device=value.device)
    return result


def cannot(corruption: Corruption, what: str, other: str) -> ConfigError:
    """The error for a corruption in the wrong place."""
    return ConfigError(
        f"this corruption does not act on {what}",
        expected="one that does",
        got=corruption.kind,
        where=type(corruption).__name__,
        fix=f"use {other}",
    )
