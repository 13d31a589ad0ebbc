"""From a configuration of continual tuning to an untrained model and its stream of tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gatedadapters.config import ContinualConfig, SearchConfig, TaskConfig, TrainingConfig
from gatedadapters.continual import Task, TaskStream, classification_tasks, language_tasks
from gatedadapters.continual.measures import exact_match, nearest_class
from gatedadapters.data import Measure, MixedTaskCollator, MixedTaskDataset, TextTask, kind_of
from gatedadapters.data.measures import EXACT_MATCH, measure
from gatedadapters.errors import ConfigError
from gatedadapters.experiments.models import load_causal_model, load_config_and_tokenizer
from gatedadapters.experiments.task_models import (
    build_model,
    check_causal,
    check_packing,
    load_language_task,
    load_tasks,
)
from gatedadapters.training import MultiTaskClassifier


def stream_orders(config: ContinualConfig) -> Iterator[tuple[str, int, list[int]]]:
    """(name, seed, order of the tasks) of each configured stream.

    The first order is that of the configuration. The others are random, distinct, and the same for every seed.
    """
    draw, orders = np.random.default_rng(0), [list(range(len(config.tasks)))]
    while len(orders) < config.orders:
        drawn = draw.permutation(len(config.tasks)).tolist()
        if drawn not in orders:
            orders.append(drawn)
    for seed in config.seeds:
        for index, order in enumerate(orders):
            yield f"seed-{seed}-order-{index}", seed, order


def build_stream(config: ContinualConfig, seed: int) -> tuple[nn.Module, TaskStream]:
    """The untrained model, and its tasks in the order of the configuration. Both depend on the seed alone.

    Raises:
        ConfigError: a task does not fit the model.
        DataError: data cannot be read.
    """
    every = (*config.tasks, *([config.general] if config.general is not None else []))
    if any(kind_of(task) != "classification" for task in every):
        return _language_stream(config, seed)
    return _labelled_stream(config, seed)


def _labelled_stream(config: ContinualConfig, seed: int) -> tuple[nn.Module, TaskStream]:
    max_length = config.training.max_length
    search = SearchConfig(
        model=config.model,
        tasks=config.tasks,
        training=TrainingConfig(seed=seed, max_length=max_length, pooling=config.pooling),
    )
    texts = [task for task in load_tasks(search) if isinstance(task, TextTask)]
    model, tokenizer = build_model(search, texts)
    if not isinstance(model, MultiTaskClassifier):
        raise ConfigError(
            "a single labelled table needs an encoder",
            expected="an encoder, or several tasks",
            got="a causal language model",
            where=f"model: {config.model}",
            fix="add tasks",
        )
    tasks = classification_tasks(model, texts, tokenizer, max_length=max_length)
    general = None if config.general is None else _nearest_class_task(config.general, search, tokenizer)
    return model, TaskStream(tasks, general)


def _nearest_class_task(task: TaskConfig, search: SearchConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """A task without a head, which measures the general ability of a classifier's backbone by nearest class means."""
    (text,) = load_tasks(search.model_copy(update={"tasks": (task,)}))
    splits = {}
    for split in ("train", "test"):
        data = MixedTaskDataset([text], tokenizer, split, search.training.max_length)
        splits[split] = [data[i] for i in range(len(data))]
    return Task(text.name, splits["train"], splits["test"], MixedTaskCollator(tokenizer), nearest_class)


def _language_stream(config: ContinualConfig, seed: int) -> tuple[nn.Module, TaskStream]:
    max_length = config.training.max_length
    every = (*config.tasks, *([config.general] if config.general is not None else []))
    if labelled := [task.title for task in every if kind_of(task) == "classification"]:
        raise ConfigError(
            "tasks that a language model answers in tokens do not mix with labelled tables",
            expected="kinds text, chat and choice, or classification alone",
            got=f"kind: classification of {', '.join(labelled)}",
            where="tasks",
            fix="kind: choice for the labelled tables, or an answer column",
        )
    model_config, tokenizer = load_config_and_tokenizer(config.model, max_length)
    check_causal(model_config, config.model)
    torch.manual_seed(seed)
    model = load_causal_model(config.model)
    if any(task.packing for task in every):
        check_packing(model, config.model)
    loaded = [load_language_task(task, seed, where="tasks") for task in every]
    tasks = [
        _with_measure(found, task, data.test, tokenizer)
        for found, task, data in zip(
            language_tasks(loaded, tokenizer, max_length=max_length), every, loaded, strict=True
        )
    ]
    general = tasks.pop() if config.general is not None else None
    return model, TaskStream(tasks, general)


def _with_measure(found: Task, task: TaskConfig, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> Task:
    """The task, scored by the first measure that its configuration names, if it names one."""
    if not task.measures:
        return found
    name = task.measures[0]
    if name == EXACT_MATCH:
        return replace(found, measure=exact_match)
    return replace(
        found, measure=NamedMeasure(name, measure(name, f"task {task.title!r}: measures"), examples, tokenizer)
    )


class NamedMeasure:
    """A measure of a user's, as a stream calls it.

    Args:
        name: its name.
        measure: the measure.
        examples: the held-out examples.
        tokenizer: of the model.
    """

    def __init__(
        self, name: str, measure: Measure, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.__qualname__ = name  # a stream goes on only with the same measures, which it knows by their names
        self.measure, self.examples, self.tokenizer = measure, examples, tokenizer

    def __call__(self, model: nn.Module, task: Task) -> float:
        """Score a model."""
        return float(self.measure(model, self.tokenizer, self.examples))
