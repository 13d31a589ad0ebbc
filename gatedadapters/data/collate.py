"""From labelled tasks to batches: a tokenised data set, a collator, and a sampler that balances the tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from gatedadapters.data.language import LanguageCollator, LanguageDataset
from gatedadapters.data.tasks import AnyTask, ChatTask, TextTask
from gatedadapters.errors import DataError

_SCALARS = ("labels", "task_ids")
Feature = dict[str, Any]


class MixedTaskDataset(Dataset[Feature]):
    """One split of several tasks, tokenised when it is built. The examples of the first task come first.

    An item holds `input_ids` and `attention_mask` (lists of up to `max_length` ints), `token_type_ids` if the tokenizer
    makes them, `labels` and `task_ids` (the position of its task). In classification, `labels` is the index of a class
    of its task. Items of the other kinds are those of a `LanguageDataset`: `labels` holds one int per token.
    transformers' Trainer drops `task_ids` unless its arguments say `remove_unused_columns=False`.

    Args:
        tasks: the tasks; their order gives the task ids. Either all are classification tasks, or none is.
        tokenizer: the tokenizer of the model.
        split: `"train"`, `"validation"` or `"test"`.
        max_length: tokens after which an example is cut.

    Attributes:
        sizes: number of items of each task in this split.

    Raises:
        DataError: there is no task, a task lacks the split, tasks of different kinds do not mix, or there is nothing to
            predict.
    """

    def __init__(
        self,
        tasks: Sequence[AnyTask],
        tokenizer: PreTrainedTokenizerBase,
        split: str = "train",
        max_length: int = 128,
    ) -> None:
        if not tasks:
            raise DataError(
                "a mixed data set needs tasks",
                expected="at least one task",
                got="none",
                where="MixedTaskDataset(tasks=)",
                fix="give at least one task",
            )
        self.tasks = tuple(tasks)
        predicts_tokens(self.tasks)
        self.sizes: list[int] = []
        self._features: list[Feature] = []
        for task_id, task in enumerate(self.tasks):
            items = _tokenised(task, tokenizer, split, max_length)
            self._features += [{**item, "task_ids": task_id} for item in items]
            self.sizes.append(len(items))

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, index: int) -> Feature:
        return dict(self._features[index])


def _tokenised(task: AnyTask, tokenizer: PreTrainedTokenizerBase, split: str, max_length: int) -> list[Feature]:
    if isinstance(task, TextTask):
        examples = task.split(split)
        encoded = tokenizer(examples.texts, examples.pairs, truncation=True, max_length=max_length)
        columns = {**encoded, "labels": examples.labels}
        return [{key: values[index] for key, values in columns.items()} for index in range(len(examples))]
    packing = split == "train" and isinstance(task, ChatTask) and task.packing
    data = LanguageDataset(task.split(split), tokenizer, max_length, packing=packing)
    return [data[index] for index in range(len(data))]


def predicts_tokens(tasks: Sequence[AnyTask]) -> bool:
    """Whether the tasks are learned by predicting tokens, so that they share the output head of a language model.

    Raises:
        DataError: some are and others are classification tasks, which have heads of their own.
    """
    classified = [task.name for task in tasks if isinstance(task, TextTask)]
    others = [task.name for task in tasks if not isinstance(task, TextTask)]
    if classified and others:
        raise DataError(
            "tasks of these kinds do not share a batch",
            expected="classification tasks alone, or tasks that a language model answers in tokens",
            got=f"{', '.join(classified)} (classification) and {', '.join(others)} (text, chat or choice)",
            where="tasks",
            fix="kind: choice for the classification tasks: their labels become choices that the model answers with",
        )
    return bool(others)


def collator(tasks: Sequence[AnyTask], tokenizer: PreTrainedTokenizerBase) -> MixedTaskCollator | LanguageCollator:
    """What makes batches of items of a `MixedTaskDataset` of these tasks.

    Raises:
        DataError: the tasks are of kinds that do not mix, or the tokenizer cannot pad.
    """
    return LanguageCollator(tokenizer) if predicts_tokens(tasks) else MixedTaskCollator(tokenizer)


class MixedTaskCollator:
    """Pads classified items of a `MixedTaskDataset` to the longest of a batch.

    A batch holds `input_ids`, `attention_mask` (and `token_type_ids`) as LongTensors of shape (batch, length), `labels`
    and `task_ids` as LongTensors of shape (batch,).

    Args:
        tokenizer: decides what to pad with, and on which side.
        max_length: tokens after which an example is cut; None leaves examples as the data set cut them.

    Raises:
        DataError: the tokenizer has no padding token; a batch is empty or its features differ in their keys.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        if tokenizer.pad_token_id is None:
            ends = tokenizer.eos_token is not None
            fix = f"tokenizer.pad_token = {'tokenizer.eos_token' if ends else 'a token that it knows'}"
            raise DataError(
                "the tokenizer cannot pad",
                expected="a pad_token",
                got="none",
                fix=fix,
                where="MixedTaskCollator(tokenizer=)",
            )
        self.max_length = max_length
        self.left = tokenizer.padding_side == "left"
        self.fill = {"input_ids": int(tokenizer.pad_token_id), "token_type_ids": tokenizer.pad_token_type_id}

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Make one batch of `features`."""
        keys = {frozenset(feature) for feature in features}
        if len(keys) != 1:
            got = " and ".join(str(sorted(found)) for found in keys) or "an empty batch"
            raise DataError(
                "features do not collate",
                expected="the same keys in every feature",
                got=got,
                where="MixedTaskCollator",
                fix="leave out the columns that only some examples have",
            )
        return {key: self._column(key, [feature[key] for feature in features]) for key in features[0]}

    def _column(self, key: str, values: list[Any]) -> Tensor:
        if key in _SCALARS:
            return torch.tensor(values, dtype=torch.long)
        rows = [torch.as_tensor(value, dtype=torch.long)[: self.max_length] for value in values]
        padded = torch.full((len(rows), max(map(len, rows))), self.fill.get(key, 0), dtype=torch.long)
        for line, row in zip(padded, rows, strict=True):
            line[len(line) - len(row) if self.left else 0 :][: len(row)] = row
        return padded


class TaskSampler(Sampler[int]):
    """Draws indices into a `MixedTaskDataset`; `task_sampler` builds one and says how it draws."""

    def __init__(
        self, sizes: Sequence[int], *, temperature: float, batch_size: int, num_samples: int, seed: int
    ) -> None:
        settings = {"temperature": temperature, "batch_size": batch_size, "num_samples": num_samples}
        settings |= {f"sizes[{task}]": size for task, size in enumerate(sizes)} or {"len(sizes)": 0}
        for name, value in settings.items():
            if not value > 0:
                raise DataError(
                    "a sampler cannot be built",
                    expected=f"{name} > 0",
                    got=value,
                    where="task_sampler",
                    fix="raise it above 0; an empty task takes no part",
                )
        shares = np.asarray(sizes, dtype=np.float64) ** (1.0 / temperature)
        self.probabilities = shares / shares.sum()
        self.sizes = list(sizes)
        self.batch_size = batch_size
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw other indices from now on. accelerate and transformers call this at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        starts = np.cumsum([0, *self.sizes[:-1]])
        edges = np.cumsum(self.probabilities)
        streams = [_shuffled_forever(size, generator) for size in self.sizes]
        for first in range(0, self.num_samples, self.batch_size):
            count = min(self.batch_size, self.num_samples - first)
            # Positions evenly spaced in [0, 1) from one random offset meet each task's share to within one example.
            positions = (np.arange(count) + generator.random()) / count
            tasks = np.minimum(np.searchsorted(edges, positions, side="right"), len(self.sizes) - 1)
            for task in generator.permutation(tasks):
                yield int(starts[task]) + next(streams[task])


def task_sampler(
    sizes: Sequence[int], *, temperature: float = 2.0, batch_size: int, num_samples: int, seed: int = 0
) -> TaskSampler:
    """A sampler across tasks of unequal size, in batches that mix the tasks.

    Task t is drawn with a probability proportional to `n_t ** (1 / temperature)`. Every batch of `batch_size` indices
    meets each task's share to within one example. The examples of a task come in shuffled passes: none comes twice
    before all came once. The draw depends on the seed and the epoch alone.

    Args:
        sizes: number of examples of each task, in the order of the tasks: `MixedTaskDataset.sizes`.
        temperature: 1 draws tasks in proportion to their sizes; infinity draws all equally often.
        batch_size: batch size of the loader.
        num_samples: number of indices in one pass over the sampler.
        seed: seed of the draw.

    Raises:
        DataError: a size, the temperature, the batch size or the number of samples is not positive.

    References:
        Arivazhagan et al., Massively Multilingual Neural Machine Translation in the Wild, 2019, section 4.2.
    """
    return TaskSampler(sizes, temperature=temperature, batch_size=batch_size, num_samples=num_samples, seed=seed)


def _shuffled_forever(size: int, generator: np.random.Generator) -> Iterator[int]:
    """Indices below `size`, in a new random order each time that all have come."""
    while True:
        yield from (int(index) for index in generator.permutation(size))
