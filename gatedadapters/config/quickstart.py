"""The quick start as a configuration like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gatedadapters.config.penalty import Budget
from gatedadapters.config.search import SearchConfig, TrainingConfig
from gatedadapters.config.tasks import TaskConfig

QUICKSTART_TASKS = ("rotten_tomatoes", "subjectivity", "tweets", "medical_specialty")


def quickstart_config(
    *,
    tasks: Sequence[str] = QUICKSTART_TASKS,
    steps: int = 300,
    examples: int = 1500,
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> SearchConfig:
    """A search on a real encoder and real tasks under a budget, compared with uniform LoRA and a random structure.

    Args:
        tasks: names of bundled tasks.
        steps: optimiser steps of each of the three trainings.
        examples: number of training examples of each task.
        seed: seed of data splits, heads, gates and batches.
        device: the device to train on; `auto` takes the one that accelerate finds.

    Raises:
        ConfigError: a value is out of range.
    """
    return SearchConfig(
        model="bundled:minilm-l6",
        tasks=tuple(TaskConfig(bundled=name, max_train=examples, max_test=min(500, examples)) for name in tasks),
        space="encoder-mixed",
        budget=Budget(fraction=0.125),
        training=TrainingConfig(steps=steps, max_length=64, seed=seed, device=device),
        compare=("uniform", "random"),
    )
