"""Making an existing LoRA smaller, as data: the LoRA, its task, a budget, training."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Literal, Self

from pydantic import Field

from gatedadapters.config.base import FileConfig, found_in
from gatedadapters.config.penalty import Budget, Schedule
from gatedadapters.config.search import SearchConfig, TaskConfig, TrainingConfig


class CompressTrainingConfig(TrainingConfig):
    """How long and how fast a LoRA is trained while it shrinks: shorter and more gently than one that starts anew."""

    steps: int = Field(200, gt=0)
    learning_rate: float = Field(1e-3, gt=0)


class CompressConfig(FileConfig):
    """What `gatedadapters compress` does.

    Attributes:
        lora: folder of a LoRA that peft saved for sequence classification.
        budget: what stays of it.
        task: what it is trained and tested on.
        model: its base: a folder, a hub id, or `bundled:NAME`; default: the base that the LoRA names.
        classes: labels in the order of the LoRA's outputs; default: sorted.
        training: how long and how fast.
    """

    version: Literal[1] = 1
    lora: str
    budget: Budget
    task: TaskConfig
    model: str | None = None
    classes: tuple[str, ...] | None = None
    training: CompressTrainingConfig = CompressTrainingConfig()

    def as_search(self, model: str) -> SearchConfig:
        """The search that this is, given the name of the base model.

        The penalty acts from the first step: the paths of a trained LoRA mean something already.
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
        """The same with relative paths counted from `folder`."""
        changes: dict[str, object] = {
            "lora": str(folder / self.lora),
            "task": self.task.from_folder(folder),
            "model": self.model and found_in(folder, self.model),
        }
        return self.model_copy(update=changes)
