"""Continual tuning as data: the probe, the core, training, and the configuration of `gatedadapters continual`."""

from __future__ import annotations

import math
from pathlib import Path as FilePath
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from gatedadapters.config.base import Config, Count, FileConfig, Place, Seed, found_in
from gatedadapters.config.select import TuningConfig
from gatedadapters.config.tasks import TaskConfig, distinct_titles


class ProbeConfig(Config):
    """A probe shows which weights a task moves; see `probe`.

    The defaults are those of the released method.

    Attributes:
        kind: `training` is a short full fine-tuning, which is then undone. `gradient` takes no step: it reads the mean
            gradient of the batches that the squared gradient is averaged over. That costs a fraction of the time, and
            neither moments of an optimiser nor a copy of the model on disk. The options `of_training` are for
            `training` alone. Where a task has a new head, gradients say less: they go through random weights.
        epochs: passes over the examples.
        steps: number of optimiser steps, in place of `epochs`.
        fraction: share of the task's training examples to use.
        learning_rate: rate of AdamW at its highest; it decays along a cosine.
        warmup: share of the steps in which the rate rises.
        batch_size: examples per step.
        fisher_batches: number of batches that the squared gradient is averaged over.
        fisher_batch_size: examples in each of these batches.
        start: `base` probes every task from the pretrained model, before any task is tuned. `current` probes each task
            from the model that it is about to change.
        dtype: number format in which the changes of the weights are stored.
    """

    added: ClassVar[tuple[str, ...]] = ("kind",)
    of_training: ClassVar[tuple[str, ...]] = ("epochs", "steps", "fraction", "learning_rate", "warmup", "batch_size")

    kind: Literal["training", "gradient"] = "training"
    epochs: float = Field(1.0, gt=0)
    steps: Count | None = None
    fraction: float = Field(1.0, gt=0, le=1)
    learning_rate: float = Field(2e-5, gt=0)
    warmup: float = Field(0.1, ge=0, le=1)
    batch_size: Count = 32
    fisher_batches: Count = 150
    fisher_batch_size: Count = 2
    start: Literal["base", "current"] = "base"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @model_validator(mode="after")
    def _read(self) -> ProbeConfig:
        if self.kind == "gradient" and (unread := self.changed_fields(self.of_training)):
            raise ValueError(f"kind: gradient takes no step, leave {', '.join(unread)} out")
        return self


class CoreConfig(Config):
    """The core of a task: the part of the model that moves while the task is tuned. All else is frozen.

    Attributes:
        share: share of the tensors (granularity `tensor`) or of the elements (`element`) to choose.
        granularity: choose whole tensors, as the released method does, or single elements.
        overlap: `allow` lets a task choose again what an earlier task has chosen; `exclude_previous` does not.
        include: roles or names (with * and ?) of the tensors to choose from. Default: all of the backbone. By tensor,
            the released score prefers small vectors, which can hardly learn a task by themselves.
        exclude: roles or names of tensors to leave out of these.
    """

    share: float = Field(0.1, gt=0, lt=1)
    granularity: Literal["tensor", "element"] = "tensor"
    overlap: Literal["allow", "exclude_previous"] = "allow"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None


class StreamTrainingConfig(TuningConfig):
    """How long and how fast each task of a stream is tuned.

    Attributes:
        steps: optimiser steps per task.
        head_learning_rate: learning rate of task heads. Default: that of the backbone.
        checkpoint_steps: number of steps between two checkpoints. None writes none: a killed task starts again.
    """

    head_learning_rate: float | None = Field(None, gt=0)
    checkpoint_steps: Count | None = 200


class ContinualConfig(FileConfig):
    """The configuration of `gatedadapters continual`, which tunes a model on one task after another.

    Attributes:
        model: the model to tune: a folder, a hub id, or `bundled:NAME`.
        tasks: the tasks, in their first order. Classification tasks each have a head; tasks of the other kinds are for
            a causal language model, and do not mix with them.
        strategy: name of the strategy, or its options with the name as `kind`.
        compare: strategies to compare with it, on the same streams.
        general: a task that is never trained, to measure general ability: a labelled table, classified by nearest class
            means, or a task of another kind for a causal language model.
        training: how long and how fast each task is tuned.
        seeds: seeds of data, heads and batches. Each seed is a stream of its own.
        orders: number of orders of the tasks. The first order is that of `tasks`; the others are drawn.
        keep: whether to store what every task changed, so that each earlier state can be restored.
        pooling: how a classifier pools hidden states: their mean, or the first position.
    """

    version: Literal[1] = 1
    model: Place
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    strategy: str | dict[str, Any] = "l2_fisher"
    compare: tuple[str | dict[str, Any], ...] = ()
    general: TaskConfig | None = None
    training: StreamTrainingConfig = StreamTrainingConfig()
    seeds: tuple[Seed, ...] = Field((0,), min_length=1)
    orders: Count = 1
    keep: bool = True
    pooling: Literal["mean", "first"] = "mean"

    @field_validator("tasks")
    @classmethod
    def _distinct(cls, tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
        distinct_titles(tasks)
        return tasks

    @model_validator(mode="after")
    def _consistent(self) -> ContinualConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must differ")
        if self.training.changed_fields({"seed"}):
            raise ValueError("training.seed: each stream has its own, give seeds")
        if self.orders > math.factorial(len(self.tasks)):
            raise ValueError(
                f"{len(self.tasks)} tasks have {math.factorial(len(self.tasks))} orders, not {self.orders}"
            )
        return self

    def from_folder(self, folder: FilePath) -> Self:
        """A copy whose relative paths are resolved against `folder`."""
        changes: dict[str, object] = {
            "tasks": tuple(task.from_folder(folder) for task in self.tasks),
            "model": found_in(folder, self.model),
            "general": self.general and self.general.from_folder(folder),
            "strategy": _placed(self.strategy, folder),
            "compare": tuple(_placed(strategy, folder) for strategy in self.compare),
        }
        return self.model_copy(update=changes)


def _placed(strategy: str | dict[str, Any], folder: FilePath) -> str | dict[str, Any]:
    """A strategy in which the files that it names are resolved against `folder`."""
    if isinstance(strategy, str):
        return strategy
    files = {key: value for key in ("source", "space") if isinstance(value := strategy.get(key), str)}
    return strategy | {key: found_in(folder, value) for key, value in files.items()}
