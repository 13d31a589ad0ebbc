"""Running a configuration of continual tuning from start to finish, and what it leaves in the output folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from gatedadapters.config import ContinualConfig, SearchConfig, StreamTaskConfig, StreamTrainingConfig, TrainingConfig
from gatedadapters.continual import (
    StreamResult,
    Task,
    TaskStream,
    answer_task,
    check_stream,
    choice_tasks,
    classification_tasks,
    metrics_table,
    run_stream,
)
from gatedadapters.continual.digests import difference
from gatedadapters.continual.measures import nearest_class
from gatedadapters.continual.result import STREAM
from gatedadapters.continual.strategies import Strategy, resolve
from gatedadapters.continual.strategies.random import RandomCores
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset
from gatedadapters.data.bundled import CHOICE_TASKS, load_choices
from gatedadapters.data.language import read_passages, sample_passages, split_passages
from gatedadapters.errors import ArtifactError, ConfigError
from gatedadapters.experiments.models import is_causal, located, reading, shape_and_tokenizer
from gatedadapters.experiments.search import check_free
from gatedadapters.experiments.setup import build_model, load_tasks
from gatedadapters.inspection import TensorBoardWriter, save_core_png, save_stream_png
from gatedadapters.reporting.versions import versions
from gatedadapters.training import MultiTaskClassifier

STREAMS, PICTURES, METRICS, TABLE, CONFIG = "streams", "pictures", "metrics.json", "table.txt", "continual.yaml"
LOGS = "tensorboard"
OUTPUTS = frozenset({STREAMS, PICTURES, METRICS, TABLE, CONFIG, LOGS})


@dataclass(frozen=True)
class Streams:
    """Every stream of every strategy; the first strategy is the one asked for, the others are compared with it."""

    results: dict[str, list[StreamResult]]

    def table(self) -> str:
        """The first stream of each strategy, then all of them together."""
        parts = [str(results[0]) for results in self.results.values()]
        count = len(next(iter(self.results.values())))
        parts.append(f"mean and 95 % interval over {count} streams (orders and seeds):" if count > 1 else "all:")
        parts.append(metrics_table({name: [r.metrics for r in results] for name, results in self.results.items()}))
        reports = [results[0].stages[0].report for results in self.results.values()]
        first = next(iter(self.results.values()))[0].stages[0].task
        parts += [f"core of {first}: {report}" for report in reports if report]
        return "\n\n".join(parts)


def run(config: ContinualConfig, folder: Path, *, overwrite: bool = False) -> Streams:
    """Run every strategy on every stream, and write everything into `folder`. A run that was stopped goes on.

    Raises:
        GatedAdaptersError: whatever is wrong with the configuration, the data or the folder.
    """
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    text = yaml.safe_dump(config.as_written(folder.absolute(), exclude_defaults=True), sort_keys=False)
    strategies = _named([resolve(part) for part in (config.strategy, *config.compare)])
    parts = {path.name for path in folder.glob(f".{CONFIG}.*")}  # of a process that was killed as it wrote one
    check_free(folder, OUTPUTS | parts, overwrite=overwrite or _goes_on(folder, text))
    model, stream = build(config, config.seeds[0])
    for strategy in strategies.values():  # whatever is wrong with any of them is said before the first is trained
        check_stream(model, stream, strategy, training=config.training)
    if overwrite:
        for name in (STREAMS, PICTURES, LOGS):
            shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{CONFIG}.{os.getpid()}"
    part.write_text(text, encoding="utf-8")
    os.replace(part, folder / CONFIG)  # whole or not at all, before anything that only goes with it
    for name in parts:
        (folder / name).unlink(missing_ok=True)
    (folder / PICTURES).mkdir(exist_ok=True)
    results: dict[str, list[StreamResult]] = {name: [] for name in strategies}
    for place, seed, order in _streams(config):
        for name, strategy in strategies.items():
            _say(f"{name}, stream {place}: {', '.join(config.tasks[i].title for i in order)}")
            model, stream = build(config, seed)
            main = next(iter(results))
            if name != main and isinstance(strategy, RandomCores):  # as many elements as what it controls for
                sized = _of_equal_size(strategy, results[main][-1])
                try:
                    check_stream(model, stream.ordered(order), sized, training=config.training)
                    strategy = sized
                except ConfigError as error:  # what it may choose from is smaller than what was trained
                    _say(f"  {name} keeps its share, for {error}")
            logs = folder / LOGS / name / place
            shutil.rmtree(logs, ignore_errors=True)  # a stream that goes on tells all of it again
            with TensorBoardWriter(logs) as writer:
                result = run_stream(
                    model,
                    stream.ordered(order),
                    strategy,
                    training=config.training.model_copy(update={"seed": seed}),
                    folder=folder / STREAMS / name / place,
                    keep=config.keep,
                    watch=lambda line: _say(f"  {line}"),
                    on_stage=writer.stream,
                )
            results[name].append(result)
    streams = Streams(results)
    for name, found in results.items():
        save_stream_png(found[0], folder / PICTURES / f"{name}.png", title=name)
        if cores := found[0].cores():
            save_core_png(cores, folder / PICTURES / f"{name}-cores.png")
    data = {
        "versions": versions(),
        "config": config.as_written(),
        "streams": {name: [result.to_data() for result in found] for name, found in results.items()},
    }
    (folder / METRICS).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / TABLE).write_text(streams.table() + "\n", encoding="utf-8")
    return streams


def report(folder: Path, streams: Streams) -> None:
    """Print what a run came to and where it lies."""
    print(streams.table())
    print(f"\nIn {folder}:")
    for name, what in {
        f"{PICTURES}/": "scores after every task, and where the cores lie",
        f"{LOGS}/": "the same while it runs: tensorboard --logdir",
        f"{STREAMS}/": "what every task changed; gatedadapters.StreamResult.load(...).restore(model, to=k)",
        METRICS: "every number",
        CONFIG: "the configuration",
    }.items():
        print(f"  {name:<15} {what}")


def build(config: ContinualConfig, seed: int) -> tuple[nn.Module, TaskStream]:
    """The untrained model and its tasks in the order of the configuration, by seed.

    Raises:
        ConfigError: a task that does not go with the model.
        DataError: data that cannot be read.
    """
    training = config.training
    generative = [task for task in config.tasks if _is_generative(task)]
    if not generative:
        own = SearchConfig(
            model=config.model,
            tasks=config.tasks,
            training=TrainingConfig(seed=seed, max_length=training.max_length, pooling=config.pooling),
        )
        texts = load_tasks(own)
        model, tokenizer = build_model(own, texts)
        if not isinstance(model, MultiTaskClassifier):
            raise ConfigError(
                "a single labelled table needs an encoder",
                expected="an encoder, or several tasks",
                got="a causal language model",
                where=f"model: {config.model}",
                fix="add tasks",
            )
        tasks = classification_tasks(model, texts, tokenizer, max_length=training.max_length)
        general = None if config.general is None else _read_out(config.general, own, tokenizer, training)
        return model, TaskStream(tasks, general)
    every = (*config.tasks, *([config.general] if config.general is not None else []))
    labelled = [task.title for task in every if not _is_generative(task)]
    shape, tokenizer = shape_and_tokenizer(config.model, training.max_length)
    if labelled or not is_causal(shape):
        raise ConfigError(
            "questions with answers are for causal language models, and do not mix with labelled tables",
            expected="answer: of every table, and a causal language model",
            got=f"labelled: {', '.join(labelled)}" if labelled else ", ".join(shape.architectures or ["?"]),
            where="tasks",
            fix="give each task an answer column, or none",
        )
    torch.manual_seed(seed)
    with reading(config.model):
        causal: nn.Module = AutoModelForCausalLM.from_pretrained(located(config.model), dtype=torch.float32)
    found = [_questions(task, tokenizer, training.max_length, seed) for task in every]
    general = found.pop() if config.general is not None else None
    return causal, TaskStream(found, general)


def _read_out(
    task: StreamTaskConfig, own: SearchConfig, tokenizer: PreTrainedTokenizerBase, training: StreamTrainingConfig
) -> Task:
    """General ability of a classifier's backbone."""
    if _is_generative(task):
        raise ConfigError(
            expected="a labelled table or a bundled classification task",
            got=task.title,
            where="general",
            fix="questions are for causal language models",
        )
    (text,) = load_tasks(own.model_copy(update={"tasks": (task,)}))
    parts = {}
    for part in ("train", "test"):
        data = MixedTaskDataset([text], tokenizer, part, training.max_length)
        parts[part] = [data[i] for i in range(len(data))]
    return Task(text.name, parts["train"], parts["test"], MixedTaskCollator(tokenizer), nearest_class)


def _questions(task: StreamTaskConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, seed: int) -> Task:
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
    train_part = sample_passages(train_part, task.max_train, seed=seed)  # files may be sorted
    held_out = sample_passages(held_out, task.max_test, seed=seed)
    return answer_task(task.title, train_part, held_out, tokenizer, max_length=max_length)


def _is_generative(task: StreamTaskConfig) -> bool:
    return task.answer is not None or task.bundled in CHOICE_TASKS


def _streams(config: ContinualConfig) -> Iterator[tuple[str, int, list[int]]]:
    """(name, seed, order) of each stream; the first order is the one given."""
    draw, orders = np.random.default_rng(0), [list(range(len(config.tasks)))]
    while len(orders) < config.orders:
        drawn = draw.permutation(len(config.tasks)).tolist()
        if drawn not in orders:
            orders.append(drawn)
    for seed in config.seeds:
        for order in range(config.orders):
            yield f"seed-{seed}-order-{order}", seed, orders[order]


def _named(strategies: list[Strategy]) -> dict[str, Strategy]:
    """Each under its kind, with a number where it is used more than once."""
    found: dict[str, Strategy] = {}
    for strategy in strategies:
        number = sum(name.rpartition("-")[0] == strategy.kind or name == strategy.kind for name in found)
        found[f"{strategy.kind}-{number + 1}" if number else strategy.kind] = strategy
    return found


def _of_equal_size(strategy: RandomCores, main: StreamResult) -> RandomCores:
    """A random core with no size of its own has as many elements as the first strategy trained on the same task."""
    fields: dict[str, Any] = strategy.model_dump(exclude_unset=True)
    if "elements" in fields or "share" in fields.get("core", {}) or len(main.stages) != len(main.tasks):
        return strategy
    return strategy.model_copy(update={"elements": tuple(stage.elements for stage in main.stages)})


def _goes_on(folder: Path, text: str) -> bool:
    """Whether what `folder` holds is this run, or one that was stopped before anything was computed.

    Raises:
        ArtifactError: it holds results of another configuration, naming what differs.
    """
    if not ((folder / METRICS).exists() or any(folder.glob(f"{STREAMS}/*/*/{STREAM}"))):
        return True
    file = folder / CONFIG
    earlier = file.read_text(encoding="utf-8") if file.is_file() else None
    if earlier in (text, None):
        return earlier is not None
    place, expected, got = difference(yaml.safe_load(earlier), yaml.safe_load(text))
    raise ArtifactError(
        "the folder holds a run of another configuration",
        expected=expected,
        got=got,
        where=f"{file}: {place.removeprefix('.')}",
        fix="give the same one, another --out, or --overwrite",
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr)
