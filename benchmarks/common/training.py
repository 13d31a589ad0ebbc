"""How models are trained with the Trainer, and structures that are given instead of searched."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

import gatedadapters as ga
from benchmarks.common.store import SCRATCH


def training_arguments(*, steps: int, batch: int, rate: float, seed: int, bf16: bool = False) -> TrainingArguments:
    """A run without logs, checkpoints and evaluation; the learning rate warms up for 6 % of the steps."""
    return TrainingArguments(
        output_dir=str(SCRATCH / "trainer" / str(os.getpid())),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        warmup_steps=round(0.06 * steps),
        weight_decay=0.0,
        seed=seed,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_steps=steps,
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def dense_cost(model: nn.Module, space: str | ga.SearchSpace) -> float:
    """Parameters of all candidates of a space together."""
    cost = ga.attach(model, space).bank.dense_cost()
    ga.detach(model)
    return cost


def attach_best(
    model: nn.Module, space: str | ga.SearchSpace, size: int, scores: Callable[[Any], Tensor], *, seed: int
) -> None:
    """Attach, ungated, the candidates with the highest scores that fit into `size` parameters.

    Args:
        model: gets the adapters.
        space: the candidates.
        size: in parameters.
        scores: (tasks, units) of the gate bank that it is given.
        seed: of the first weights.
    """
    candidates = ga.attach(model, space, seed=seed)
    structure = candidates.discretize(ga.Budget(params=size), scores=scores(candidates.bank))
    ga.detach(model)
    ga.attach(model, structure, seed=seed)
