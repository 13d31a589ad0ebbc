"""Both versions of a base, as the arms of a transfer train and measure them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from gatedadapters.artifacts import load_adapters
from gatedadapters.config import SearchConfig, TransferConfig
from gatedadapters.data import AnyTask, ChatTask, MixedTaskDataset, collator, predicts_tokens
from gatedadapters.errors import LayoutError
from gatedadapters.experiments.arms import SEARCHED, ArmRunner
from gatedadapters.experiments.evaluation import accuracies, mean_loss, score_tasks
from gatedadapters.structure import Structure
from gatedadapters.supernet.adapters import Adapters, get_adapters
from gatedadapters.supernet.attach import attach, detach
from gatedadapters.transfer import ActivationShift, Damage, activation_shift, knowledge_sensitivity, predict_damage
from gatedadapters.transfer.evaluate import as_before
from gatedadapters.transfer.sensitivity import weigh_by

SENSITIVITY_TEXTS = 64


@dataclass(frozen=True)
class Measured:
    """The scores of a model.

    Attributes:
        loss: mean test loss over tasks.
        accuracy: mean test accuracy; None for language models.
    """

    loss: float
    accuracy: float | None

    @property
    def main(self) -> float:
        """What a report is about: the accuracy where there is one, else the loss."""
        return self.loss if self.accuracy is None else self.accuracy


class BasePair:
    """Both versions of a base, with equal heads, for one seed.

    Attributes:
        old: the model before the update.
        new: the model after it.
        runners: the arm runners of both.

    Raises:
        LayoutError: the two do not have the same vocabulary.
    """

    def __init__(self, config: TransferConfig, tasks: Sequence[AnyTask], seed: int, logs: Path) -> None:
        self.config, self.tasks = config, tasks
        shared = {name: getattr(config, name) for name in set(SearchConfig.model_fields) - {"model", "training"}}
        training = config.training.model_copy(update={"seed": seed})
        self.runners = [
            ArmRunner(SearchConfig(model=model, training=training, **shared), tasks, logs)
            for model in (config.model, config.update)
        ]
        self.old, self.new = (runner.model for runner in self.runners)
        self.tokenizer = self.runners[0].tokenizer
        words = [runner.tokenizer.get_vocab() for runner in self.runners]
        differ = sorted(words[0].items() ^ words[1].items(), key=lambda item: item[1])
        if differ:
            raise LayoutError(
                "these are not two versions of one base: the vocabulary differs",
                expected=f"the {len(words[0]):,} tokens of {config.model}",
                got=f"{len(words[1]):,} tokens, {differ[0][0]!r} is not the same",
                where=f"update: {config.update}",
                fix="give a base and its update",
            )

    def train(self, model: nn.Module, progress: tqdm[Any], *, steps: int | None = None) -> Adapters:
        """Train adapters of the configured structure or search on one of the models; they stay attached, compact.

        Args:
            model: one of the models.
            progress: a bar, which moves by one a step.
            steps: optimiser steps; default: the configured number.
        """
        runner, config = self.runners[0] if model is self.old else self.runners[1], self.config
        if config.search:
            adapters = runner.attach(config.resolved_space())
        elif config.adapter is not None:
            adapters = runner.attach(Structure.load(config.adapter))
        else:
            adapters = runner.attach(runner.whole_structure())
        name = SEARCHED if config.search else "adapter"
        whole = runner.config
        if steps is not None:
            training = whole.training.model_copy(update={"steps": steps})
            runner.config = whole.model_copy(update={"training": training})
        try:
            runner.train(adapters, name, progress, searching=config.search)
        finally:
            runner.config = whole
        runner.compact(adapters)
        return adapters

    def train_transferable(self, sensitivity: dict[str, float], progress: tqdm[Any]) -> Adapters:
        """`train` on the old base, with a search that prefers candidates of low sensitivity."""
        runner = self.runners[0]
        runner.callbacks = [WeighBySensitivity(sensitivity)]
        try:
            return self.train(self.old, progress)
        finally:
            runner.callbacks = []

    def sensitivity(self) -> dict[str, float]:
        """How much each candidate depends on feed-forward knowledge, measured on training texts and the old base."""
        batches = self._batches("train", SENSITIVITY_TEXTS)
        if "task_ids" not in inspect.signature(self.old.forward).parameters:
            batches = [_without(batch, "task_ids") for batch in batches]
        adapters = attach(self.old, self.config.resolved_space(), tasks=self.runners[0].names)
        try:
            return knowledge_sensitivity(adapters, batches)
        finally:
            detach(self.old)

    def measure(self, model: nn.Module) -> Measured:
        """Mean test loss over tasks, and of classification tasks the mean test accuracy."""
        bf16 = self.runners[0].bf16
        scores = score_tasks(model, self.tasks, self.tokenizer, self.config.training.max_length, bf16=bf16)
        right = None if predicts_tokens(self.tasks) else fmean(accuracies(scores).values())
        return Measured(mean_loss(scores), right)

    def damage(self, adapter: Path) -> Damage:
        """How much the update is expected to damage an adapter of the old base, from test texts without labels."""
        batches = self._batches("test", self.config.shift_texts)
        with as_before(self.old), as_before(self.new):
            load_adapters(self.old, adapter)
            load_adapters(self.new, adapter, base="updated")
            return predict_damage(self.old, self.new, batches)

    def shift(self) -> ActivationShift:
        """How far activations moved between the bases, measured on test texts."""
        batches = [_without(batch, "task_ids") for batch in self._batches("test", self.config.shift_texts)]
        old, new = (
            getattr(model, str(getattr(model, "base_model_prefix", "")), model) for model in (self.old, self.new)
        )
        return activation_shift(old, new, batches)

    def _batches(self, split: str, texts: int) -> list[dict[str, Any]]:
        """Batches of 16 without labels, of at most `texts` texts, which are spread evenly over the split."""
        length = self.config.training.max_length
        tasks = [replace(task, packing=False) if isinstance(task, ChatTask) else task for task in self.tasks]
        data = MixedTaskDataset(tasks, self.tokenizer, split, length)
        chosen = torch.linspace(0, len(data) - 1, min(texts, len(data))).long().tolist()
        collate = collator(self.tasks, self.tokenizer)
        batches = [collate([data[i] for i in chosen[start : start + 16]]) for start in range(0, len(chosen), 16)]
        return [_without(batch, "labels") for batch in batches]


class WeighBySensitivity(TrainerCallback):
    """Makes a search prefer candidates of low sensitivity, from its first step on."""

    def __init__(self, sensitivity: dict[str, float]) -> None:
        self.sensitivity = sensitivity

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        """Weigh the gates. `GatedTrainer` has set the penalty by now."""
        weigh_by(get_adapters(model), self.sensitivity)


def _without(batch: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != name}
