"""Making an existing LoRA smaller, as data: the LoRA, its task, a budget, training."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Literal, Self

from pydantic import Field

from gatedadapters.config.base import Count, FileConfig, Place, found_in
from gatedadapters.config.penalty import Budget, Schedule
from gatedadapters.config.search import SearchConfig, TrainingConfig
from gatedadapters.config.tasks import TaskConfig


class CompressTrainingConfig(TrainingConfig):
    """How long and how fast a LoRA is trained while it shrinks.

    A trained LoRA needs fewer steps and a lower rate than an adapter that starts from zero.
    """

    steps: Count = 200
    learning_rate: float = Field(1e-3, gt=0)


class CompressConfig(FileConfig):
    """The configuration of `gatedadapters compress`, which makes an existing LoRA smaller.

    Attributes:
        lora: folder of a LoRA that peft saved, for sequence classification or for a causal language model.
        budget: the most that may stay of it.
        task: the task to train and test on. A LoRA of a causal language model takes kinds text, chat and choice.
        model: the base model: a folder, a hub id, or `bundled:NAME`. Default: the base that the LoRA names.
        classes: labels in the order of a classifying LoRA's outputs. Default: sorted labels.
        training: how long and how fast it is trained.
    """

    version: Literal[1] = 1
    lora: Place
    budget: Budget
    task: TaskConfig
    model: Place | None = None
    classes: tuple[str, ...] | None = None
    training: CompressTrainingConfig = CompressTrainingConfig()

    def as_search(self, model: str) -> SearchConfig:
        """This compression as a search on the base model `model`.

        The penalty acts from the first step, because the paths of a trained LoRA have learned something already.
        """
        search = SearchConfig(
            model=model,
            tasks=(self.task,),
            budget=self.budget,
            training=self.training,
            schedule=Schedule(warmup=0.0),
        )
        return search.read_like(self)

    def from_folder(self, folder: FilePath) -> Self:
        """A copy whose relative paths are resolved against `folder`."""
        changes: dict[str, object] = {
            "lora": str(folder / self.lora),
            "task": self.task.from_folder(folder),
            "model": self.model and found_in(folder, self.model),
        }
        return self.model_copy(update=changes)
