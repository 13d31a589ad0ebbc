"""Applying a corruption to tasks, data sets and batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from gatedadapters.data import AnyTask, ChatTask, Examples, LanguageTask, MixedTaskDataset, TextTask
from gatedadapters.errors import ConfigError
from gatedadapters.robustness.base import Corruption, TextPerturbation, TokenisedExample, TokenPerturbation, Vocabulary
from gatedadapters.robustness.noises import LabelNoise

Task = TypeVar("Task", bound=TextTask | LanguageTask[Any])


class CorruptedDataset(Dataset[dict[str, Any]]):
    """A data set whose tokenised examples are perturbed. An item is always perturbed in the same way.

    Args:
        dataset: a data set of tokenised examples, which have `input_ids`.
        corruption: a perturbation of tokens.
        vocabulary: of the tokenizer that made the examples.

    Raises:
        ConfigError: the corruption is not one of tokens.
    """

    def __init__(self, dataset: Any, corruption: Corruption, vocabulary: Vocabulary) -> None:
        if not isinstance(corruption, TokenPerturbation):
            raise wrong_kind(corruption, "tokenised examples", "corrupt_tasks (texts, labels) or NoiseCallback")
        self.dataset, self.corruption, self.vocabulary = dataset, corruption, vocabulary

    @property
    def sizes(self) -> list[int]:
        """How many examples each task has, if the data set has several tasks."""
        sizes: list[int] = self.dataset.sizes
        return sizes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.corruption.feature(self.dataset[index], self.vocabulary, index)


def corrupt_tasks(tasks: Sequence[Task], corruption: Corruption, split: str) -> list[Task]:
    """The same tasks with one split corrupted.

    Args:
        tasks: tasks of any kind.
        corruption: of texts, or of labels and answers.
        split: `train`, `validation` or `test`.

    Raises:
        ConfigError: the corruption is not one of texts or labels, or does not act on examples of this kind.
        DataError: a task lacks the split.
    """
    result: list[Task] = []
    for position, task in enumerate(tasks):
        changed: Examples | tuple[Any, ...]
        examples = task.split(split)
        if isinstance(corruption, TextPerturbation):
            changed = (
                corruption.examples(examples)
                if isinstance(examples, Examples)
                else tuple(corruption.language_example(example, index) for index, example in enumerate(examples))
            )
        elif isinstance(corruption, LabelNoise):
            if isinstance(task, TextTask):
                examples = task.split(split)
                labels = corruption.labels(examples.labels, task.n_classes, position)
                changed = Examples(examples.texts, labels, examples.pairs)
            else:
                changed = corruption.language_examples(task.split(split), position)
        else:
            raise wrong_kind(corruption, "texts and labels", "CorruptedDataset (tokens) or NoiseCallback")
        parts: dict[str, Any] = {split: changed}
        result.append(replace(task, **parts))
    return result


def corrupted_dataset(
    tasks: Sequence[AnyTask],
    tokenizer: PreTrainedTokenizerBase,
    split: str,
    max_length: int,
    corruption: Corruption | None,
    vocabulary: Vocabulary,
) -> MixedTaskDataset | CorruptedDataset:
    """One split of several tasks, tokenised, with corrupted texts, labels or tokens.

    Args:
        tasks: tasks whose kinds mix; see `MixedTaskDataset`.
        tokenizer: of the model.
        split: `train`, `validation` or `test`.
        max_length: tokens after which a text is cut.
        corruption: what to apply; noise on embeddings or gradients, or None, leaves the data as they are.
        vocabulary: of the tokenizer.

    Raises:
        DataError: see `MixedTaskDataset`.
        ConfigError: the corruption does not act on examples of this kind.
    """
    if isinstance(corruption, TokenPerturbation) and split == "train" and any(map(_packs, tasks)):
        raise ConfigError(
            "packed conversations cannot be perturbed token by token",
            expected="packing: false",
            got="packing: true",
            where=f"tasks, and noise: {corruption.kind}",
            fix="pack no conversations, or take another noise",
        )
    if isinstance(corruption, (TextPerturbation, LabelNoise)):
        tasks = corrupt_tasks(tasks, corruption, split)
    dataset = MixedTaskDataset(tasks, tokenizer, split, max_length)
    if isinstance(corruption, TokenPerturbation):
        return CorruptedDataset(dataset, corruption, vocabulary)
    return dataset


def _packs(task: AnyTask) -> bool:
    return isinstance(task, ChatTask) and task.packing


def corrupt_batch(
    batch: Mapping[str, Tensor], corruption: Corruption, vocabulary: Vocabulary, *, pad: int = 0, key: int = 0
) -> dict[str, Tensor]:
    """A padded batch with perturbed tokens, padded anew on the same side.

    Args:
        batch: `input_ids` and `attention_mask` (batch, length). Other columns of that shape follow the tokens; columns
            of another shape stay as they are.
        corruption: a perturbation of tokens.
        vocabulary: of the tokenizer that made the batch.
        pad: id of the padding token.
        key: for example the number of the batch: batches with different keys are perturbed at different positions.

    Raises:
        ConfigError: the corruption is not one of tokens.
    """
    if not isinstance(corruption, TokenPerturbation):
        raise wrong_kind(corruption, "batches", "corrupt_tasks (texts, labels) or NoiseCallback")
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    columns = {name: value for name, value in batch.items() if value.shape == ids.shape}
    left = bool((~mask[:, 0]).any())
    rows = []
    for index, where in enumerate(mask):
        feature: TokenisedExample = {name: value[index][where].tolist() for name, value in columns.items()}
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


def wrong_kind(corruption: Corruption, what: str, other: str) -> ConfigError:
    """The error for a corruption that cannot be applied to `what`; `other` says what it can be given to."""
    return ConfigError(
        f"this corruption does not act on {what}",
        expected="one that does",
        got=corruption.kind,
        where=type(corruption).__name__,
        fix=f"use {other}",
    )
