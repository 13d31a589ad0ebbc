"""A whole search as data: model, tasks, space, budget, training. What the command line reads."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from gatedadapters.config.base import Config, FileConfig, found_in
from gatedadapters.config.penalty import L0, Budget, Schedule
from gatedadapters.config.robustness import CorruptionConfig
from gatedadapters.config.space import SearchSpace

Rival = Literal["uniform", "random"]
BUNDLED = "bundled:"


class TaskConfig(Config):
    """One labelled task: the user's tables, or a bundled one.

    Attributes:
        name: what it is called in results; default: the training table's stem, or the bundled name.
        train: CSV, TSV, JSON lines or parquet.
        validation: the same; split off the training table if it is missing.
        test: the same.
        bundled: name of a task that a data package carries, in place of tables.
        text: column of the text.
        pair: column of a second text.
        label: column of the label.
        max_train: at most so many examples are trained on, drawn by seed, stratified.
        max_test: the same of the test table.
    """

    name: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    bundled: str | None = None
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    max_train: int | None = Field(None, gt=0)
    max_test: int | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_source(self) -> TaskConfig:
        if (self.train is None) == (self.bundled is None):
            raise ValueError("give either train (a table) or bundled (the name of a bundled task)")
        unread = self.changed_fields({"validation", "test", "text", "pair", "label"})
        if self.bundled is not None and unread:
            raise ValueError(f"a bundled task has splits and columns of its own: leave {', '.join(unread)} out")
        return self

    @property
    def title(self) -> str:
        """The name, or what stands for it."""
        return self.name or self.bundled or FilePath(self.train or "").stem

    def from_folder(self, folder: FilePath) -> Self:
        """The same with relative paths of tables counted from `folder`."""
        tables = {part: getattr(self, part) for part in ("train", "validation", "test")}
        return self.model_copy(update={part: file and str(folder / file) for part, file in tables.items()})


class TrainingConfig(Config):
    """How long and how fast.

    Attributes:
        steps: optimiser steps of the whole run: search, pruning and what follows.
        batch_size: examples per step, tasks mixed.
        learning_rate: of adapters and heads; linear decay after `warmup` (a share of the steps).
        gate_learning_rate: default: a gate can cross its range within the schedule's ramp.
        max_length: tokens after which a text is cut.
        task_temperature: tasks are drawn with probability n ** (1 / temperature).
        precision: `auto` takes bf16 where that is faster on this machine.
        device: `auto` takes what accelerate finds.
    """

    steps: int = Field(300, gt=0)
    batch_size: int = Field(16, gt=0)
    learning_rate: float = Field(2e-3, gt=0)
    gate_learning_rate: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.06, ge=0, le=1)
    max_length: int = Field(128, gt=0)
    task_temperature: float = Field(2.0, gt=0)
    pooling: Literal["mean", "first"] = "mean"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 0


class SearchConfig(FileConfig):
    """What `gatedadapters search` does.

    Attributes:
        model: a folder, a hub id, or `bundled:NAME` for a model that a data package carries.
        space: a preset, a YAML file, or a search space in place.
        budget: what the structure may cost.
        penalty: an L0 weight on the candidates' cost, in place of a budget.
        noise: what training meets; any kind of `gatedadapters.robustness`.
        perturbation: of the test texts; scores on them are reported beside those on clean ones.
        compare: rivals of equal size and equal steps, trained in the same run: `uniform` LoRA ranks at every
            linear map, a `random` structure out of the same space.
    """

    version: Literal[1] = 1
    model: str
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    space: str | SearchSpace = "encoder-mixed"
    budget: Budget = Budget(fraction=0.125)
    penalty: L0 | None = None
    schedule: Schedule = Schedule()
    noise: CorruptionConfig | None = None
    perturbation: CorruptionConfig | None = None
    training: TrainingConfig = TrainingConfig()
    compare: tuple[Rival, ...] = ()

    @field_validator("tasks")
    @classmethod
    def _distinct(cls, tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
        titles = [task.title for task in tasks]
        if len(set(titles)) != len(titles):
            raise ValueError(f"tasks need distinct names, got {', '.join(titles)}")
        return tasks

    @model_validator(mode="after")
    def _one_pressure(self) -> SearchConfig:
        if self.penalty is not None and "budget" in self.model_fields_set:
            raise ValueError("give either a budget or a penalty")
        return self

    @property
    def limit(self) -> Budget | None:
        """The budget, unless a penalty stands in its place."""
        return self.budget if self.penalty is None else None

    def resolved_space(self) -> SearchSpace:
        """The search space itself.

        Raises:
            ConfigError: unknown preset or invalid file.
        """
        return self.space if isinstance(self.space, SearchSpace) else SearchSpace.load(self.space)

    def _yaml_data(self, folder: FilePath | None) -> dict[str, Any]:
        data = super()._yaml_data(folder)
        if isinstance(self.space, SearchSpace):  # a path's kind is a default of its class, but says what it is
            data["space"] = self.space.model_dump(mode="json", exclude_none=True)
        return data

    def from_folder(self, folder: FilePath) -> Self:
        """The same with relative paths counted from `folder`."""
        changes: dict[str, Any] = {
            "tasks": tuple(task.from_folder(folder) for task in self.tasks),
            "model": found_in(folder, self.model),
        }
        if isinstance(self.space, str) and self.space.endswith((".yaml", ".yml")):
            changes["space"] = str(folder / self.space)
        return self.model_copy(update=changes)
