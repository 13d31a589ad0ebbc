"""From a configuration of continual tuning to an untrained model and its stream of tasks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from gatedadapters.config import ContinualConfig, SearchConfig, StreamTaskConfig, TrainingConfig
from gatedadapters.continual import Task, TaskStream, answer_task, choice_tasks, classification_tasks
from gatedadapters.continual.measures import nearest_class
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset
from gatedadapters.data.bundled import CHOICE_TASKS, load_choices
from gatedadapters.data.language import read_passages, sample_passages, split_passages
from gatedadapters.errors import ConfigError
from gatedadapters.experiments.task_models import build_model, load_tasks
from gatedadapters.experiments.models import is_causal, load_causal_model, load_config_and_tokenizer
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
    if any(_is_generative(task) for task in config.tasks):
        return _question_stream(config, seed)
    return _labelled_stream(config, seed)


def _is_generative(task: StreamTaskConfig) -> bool:
    """Whether the task has questions that a causal language model answers."""
    return task.answer is not None or task.bundled in CHOICE_TASKS


def _labelled_stream(config: ContinualConfig, seed: int) -> tuple[nn.Module, TaskStream]:
    max_length = config.training.max_length
    search = SearchConfig(
        model=config.model,
        tasks=config.tasks,
        training=TrainingConfig(seed=seed, max_length=max_length, pooling=config.pooling),
    )
    texts = load_tasks(search)
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


def _nearest_class_task(task: StreamTaskConfig, search: SearchConfig, tokenizer: PreTrainedTokenizerBase) -> Task:
    """A task without a head, which measures the general ability of a classifier's backbone by nearest class means."""
    if _is_generative(task):
        raise ConfigError(
            expected="a labelled table or a bundled classification task",
            got=task.title,
            where="general",
            fix="questions are for causal language models",
        )
    (text,) = load_tasks(search.model_copy(update={"tasks": (task,)}))
    splits = {}
    for split in ("train", "test"):
        data = MixedTaskDataset([text], tokenizer, split, search.training.max_length)
        splits[split] = [data[i] for i in range(len(data))]
    return Task(text.name, splits["train"], splits["test"], MixedTaskCollator(tokenizer), nearest_class)


def _question_stream(config: ContinualConfig, seed: int) -> tuple[nn.Module, TaskStream]:
    max_length = config.training.max_length
    every = (*config.tasks, *([config.general] if config.general is not None else []))
    labelled = [task.title for task in every if not _is_generative(task)]
    model_config, tokenizer = load_config_and_tokenizer(config.model, max_length)
    if labelled or not is_causal(model_config):
        raise ConfigError(
            "questions with answers are for causal language models, and do not mix with labelled tables",
            expected="answer: of every table, and a causal language model",
            got=f"labelled: {', '.join(labelled)}" if labelled else ", ".join(model_config.architectures or ["?"]),
            where="tasks",
            fix="give each task an answer column, or none",
        )
    torch.manual_seed(seed)
    model = load_causal_model(config.model)
    tasks = [_question_task(task, tokenizer, max_length, seed) for task in every]
    general = tasks.pop() if config.general is not None else None
    return model, TaskStream(tasks, general)


def _question_task(task: StreamTaskConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int) -> Task:
    if task.bundled is not None:
        train, test = task.max_train or 1000, task.max_test or 200
        loaded = load_choices(task.bundled, train=train, validation=0, test=test, seed=seed)
        return choice_tasks([loaded], tokenizer, max_length=max_length)[0]
    assert task.train is not None
    passages = read_passages(task.train, text=task.text, answer=task.answer)
    held_out_file = task.test or task.validation
    if held_out_file is None:
        train_part, held_out = split_passages(passages, 0.2, seed=seed, where=task.train)
    else:
        train_part, held_out = passages, read_passages(held_out_file, text=task.text, answer=task.answer)
    # A random sample and not the first rows, because files may be sorted.
    train_part = sample_passages(train_part, task.max_train, seed=seed)
    held_out = sample_passages(held_out, task.max_test, seed=seed)
    return answer_task(task.title, train_part, held_out, tokenizer, max_length=max_length)
