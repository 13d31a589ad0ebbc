"""A search as data: model, tasks, search space, budget, training."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from gatedadapters.config.base import Config, Count, FileConfig, Place, Seed, found_in
from gatedadapters.config.penalty import L0, Budget, Schedule
from gatedadapters.config.robustness import CorruptionConfig
from gatedadapters.config.space import SearchSpace
from gatedadapters.config.tasks import TaskConfig, distinct_titles

Rival = Literal["uniform", "random"]
Ability = Literal["merge", "peft"]
BUNDLED = "bundled:"


class TrainingConfig(Config):
    """How long and how fast adapters are trained.

    Attributes:
        steps: optimiser steps of the whole training: before the prune and after it.
        batch_size: examples per step; tasks are mixed.
        learning_rate: highest learning rate of adapters and heads; it decays linearly after the warm-up.
        gate_learning_rate: learning rate of gates. Default: a gate can cross its range within the schedule's ramp.
        weight_decay: weight decay of adapters and heads.
        warmup: share of the steps in which the learning rate rises.
        max_length: tokens after which a text is cut.
        task_temperature: a task with n examples is drawn with a probability proportional to n ** (1 / temperature).
        pooling: how a classifier pools hidden states: their mean, or the first position.
        precision: number format of the forward pass; `auto` takes bf16 where that is faster on this machine.
        device: `auto` takes the device that accelerate finds.
        seed: seed of data splits, heads, gates and batches.
    """

    steps: Count = 300
    batch_size: Count = 16
    learning_rate: float = Field(2e-3, gt=0)
    gate_learning_rate: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.06, ge=0, le=1)
    max_length: Count = 128
    task_temperature: float = Field(2.0, gt=0)
    pooling: Literal["mean", "first"] = "mean"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Seed = 0


class SearchConfig(FileConfig):
    """The configuration of `gatedadapters search`, which searches the structure of an adapter.

    Attributes:
        model: the backbone: a folder, a hub id, or `bundled:NAME` for a model that a data package carries.
        tasks: one or several labelled tasks; each has gates of its own over shared paths.
        space: the search space: a preset, a YAML file, or a search space in place.
        budget: the most that the structure may cost.
        penalty: a weight on the L0 penalty, in place of a budget.
        schedule: when the penalty acts, and when the structure is fixed.
        prior: the placement score from which the gates start; null for even gates. See `GatedTrainer`.
        structure: a structure to train as it is, in place of a search: a JSON file, or a folder that holds
            `structure.json`, such as `allocate` leaves. Space, budget and schedule then matter to rivals alone.
        noise: noise that training meets; any kind of `gatedadapters.robustness`.
        perturbation: perturbation of test texts; scores on them are reported beside those on clean texts.
        training: how long and how fast adapters are trained.
        compare: rivals to train in the same run, with as many parameters and steps: `uniform` LoRA ranks at every
            linear map, a `random` structure out of the same space.
        requires: what the result must be able to do: `merge` into the model's weights, be exported to `peft`. A space
            with kinds that cannot is refused before the search.
    """

    added: ClassVar = ("prior", "structure", "requires")

    version: Literal[1] = 1
    model: Place
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    space: str | SearchSpace = "encoder-mixed"
    budget: Budget = Budget(fraction=0.125)
    penalty: L0 | None = None
    schedule: Schedule = Schedule()
    prior: str | None = "gain"
    structure: Place | None = None
    noise: CorruptionConfig | None = None
    perturbation: CorruptionConfig | None = None
    training: TrainingConfig = TrainingConfig()
    compare: tuple[Rival, ...] = ()
    requires: tuple[Ability, ...] = ()

    @field_validator("tasks")
    @classmethod
    def _distinct(cls, tasks: tuple[TaskConfig, ...]) -> tuple[TaskConfig, ...]:
        distinct_titles(tasks)
        return tasks

    @model_validator(mode="after")
    def _one_pressure(self) -> SearchConfig:
        if self.penalty is not None and "budget" in self.model_fields_set:
            raise ValueError("give either a budget or a penalty")
        return self

    @property
    def limit(self) -> Budget | None:
        """The budget; None if a penalty stands in its place."""
        return self.budget if self.penalty is None else None

    def resolved_space(self) -> SearchSpace:
        """The search space as an object, read from its preset or file if need be.

        Raises:
            ConfigError: there is no such preset, or the file is not valid.
        """
        return self.space if isinstance(self.space, SearchSpace) else SearchSpace.load(self.space)

    def _yaml_data(self, folder: FilePath | None) -> dict[str, Any]:
        data = super()._yaml_data(folder)
        if isinstance(self.space, SearchSpace):  # with defaults: a path's `kind` is one, and tells its class
            data["space"] = self.space.model_dump(mode="json", exclude_none=True)
        return data

    def from_folder(self, folder: FilePath) -> Self:
        """A copy whose relative paths are resolved against `folder`."""
        changes: dict[str, Any] = {
            "tasks": tuple(task.from_folder(folder) for task in self.tasks),
            "model": found_in(folder, self.model),
        }
        if self.structure is not None:
            changes["structure"] = str(folder / self.structure)
        if isinstance(self.space, str) and self.space.endswith((".yaml", ".yml")):
            changes["space"] = str(folder / self.space)
        return self.model_copy(update=changes)
