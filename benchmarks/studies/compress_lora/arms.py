"""The LoRA that peft trained, and the arms: each makes it smaller."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, set_seed

import gatedadapters as ga
from benchmarks.common import peft_rivals
from benchmarks.common.store import SCRATCH
from benchmarks.common.training import training_arguments
from benchmarks.studies.compress_lora.cells import MODEL, Cell
from gatedadapters.artifacts import singular_values
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset, TextTask
from gatedadapters.data.bundled import load_encoder, load_task
from gatedadapters.experiments.evaluation import accuracies, score_tasks

BATCH, MAX_LENGTH, TRAIN, TEST, RANK = 16, 40, 1000, 1000, 8
LORA_STEPS, LORA_RATE, STEPS = 200, 3e-3, 60
START = ga.Schedule(warmup=0.0, ramp=0.2, prune=0.25)  # what is imported means something from the first step


@dataclass(frozen=True)
class Bench:
    """A task's data and what builds the classifier that its LoRA belongs to."""

    task: TextTask
    tokenizer: Any
    build: Callable[[], nn.Module]

    def fit(
        self, trainer_class: type[Trainer], model: nn.Module, rate: float, steps: int, seed: int, **more: Any
    ) -> None:
        """Train `model` on the task."""
        args = training_arguments(steps=steps, batch=BATCH, rate=rate, seed=seed)
        data = MixedTaskDataset([self.task], self.tokenizer, "train", MAX_LENGTH)
        trainer_class(model, args, train_dataset=data, data_collator=MixedTaskCollator(self.tokenizer), **more).train()

    def accuracy(self, model: nn.Module, split: str) -> float:
        """Share of examples whose class is found."""
        return accuracies(score_tasks(model, [self.task], self.tokenizer, MAX_LENGTH, split=split))[self.task.name]


def bench(name: str, seed: int) -> Bench:
    """Data and model depend on the task and the seed alone."""
    task = load_task(name, train=TRAIN, validation=1000, test=TEST, seed=seed)
    _, tokenizer = load_encoder(MODEL)

    def build() -> nn.Module:
        set_seed(seed)
        return ga.MultiTaskClassifier(load_encoder(MODEL)[0], {task.name: task.n_classes})

    return Bench(task, tokenizer, build)


def trained_lora(on: Bench, seed: int) -> Path:
    """The folder of a LoRA that peft trained and saved, head included; trained at its first use."""
    folder = SCRATCH / "compress_lora" / f"{on.task.name}_{seed}"
    if not (folder / "adapter_model.safetensors").exists():
        model = on.build()
        (head,) = model.heads
        model = peft_rivals.lora(model, RANK, modules_to_save=[f"heads.{head}"])
        on.fit(Trainer, model, LORA_RATE, LORA_STEPS, seed)
        part = folder.with_name(f"{folder.name}.{os.getpid()}")
        model.save_pretrained(part)
        os.replace(part, folder)
    return folder


def whole(on: Bench, model: nn.Module, adapters: ga.Adapters, cell: Cell) -> None:
    """The LoRA as it is."""
    adapters.compact()


def svd(on: Bench, model: nn.Module, adapters: ga.Adapters, cell: Cell) -> None:
    """The largest singular values of all modules that fit, and no training."""
    adapters.compact(adapters.discretize(_budget(adapters, cell), scores=singular_values(adapters)))


def svd_tuned(on: Bench, model: nn.Module, adapters: ga.Adapters, cell: Cell) -> None:
    """The same, then fine-tuned for as many steps as the gated run takes."""
    svd(on, model, adapters, cell)
    on.fit(ga.GatedTrainer, model, cell.rate, STEPS, cell.seed)


def random_tuned(on: Bench, model: nn.Module, adapters: ga.Adapters, cell: Cell) -> None:
    """Ranks by chance, each module's best approximation of that rank, then fine-tuned."""
    generator = torch.Generator().manual_seed(7919 * cell.seed + 17)
    scores = torch.rand(adapters.bank.kept.shape, generator=generator)
    adapters.compact(adapters.discretize(_budget(adapters, cell), scores=scores))
    on.fit(ga.GatedTrainer, model, cell.rate, STEPS, cell.seed)


def gated(on: Bench, model: nn.Module, adapters: ga.Adapters, cell: Cell) -> None:
    """Gates under the budget for a quarter of the steps, the survivors fine-tuned for the rest."""
    on.fit(ga.GatedTrainer, model, cell.rate, STEPS, cell.seed, budget=_budget(adapters, cell), schedule=START)
    adapters.compact()


def _budget(adapters: ga.Adapters, cell: Cell) -> ga.Budget:
    return ga.Budget(params=int(adapters.bank.dense_cost() * cell.share))


BY_NAME: dict[str, Callable[[Bench, nn.Module, ga.Adapters, Cell], None]] = {
    "whole": whole,
    "svd": svd,
    "svd-tuned": svd_tuned,
    "random-tuned": random_tuned,
    "gated": gated,
}
