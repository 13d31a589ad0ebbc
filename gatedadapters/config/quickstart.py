"""The quick start as a configuration like any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from gatedadapters.config.penalty import Budget
from gatedadapters.config.search import SearchConfig, TrainingConfig
from gatedadapters.config.tasks import TaskConfig

QUICKSTART_TASKS = ("rotten_tomatoes", "subjectivity", "tweets", "medical_specialty")
Device = Literal["auto", "cpu", "cuda"]


def quickstart_config(
    *,
    tasks: Sequence[str] = (),
    steps: int | None = None,
    examples: int = 1500,
    seed: int = 0,
    device: Device = "auto",
) -> SearchConfig:
    """A search on a real model under a budget, compared with uniform LoRA and a random structure.

    By default a language model of 135 million parameters learns a new language with 35,136 parameters. With `tasks` an
    encoder learns these tasks at once, which share an eighth of the candidates.

    Args:
        tasks: names of bundled classification tasks, such as `QUICKSTART_TASKS`.
        steps: optimiser steps of each of the three trainings; default: 40, or 300 with tasks.
        examples: number of training examples of each task.
        seed: seed of data splits, heads, gates and batches.
        device: the device to train on; `auto` takes the one that accelerate finds.

    Raises:
        ConfigError: a value is out of range.
    """
    if tasks:
        return SearchConfig(
            model="bundled:minilm-l6",
            tasks=tuple(TaskConfig(bundled=name, max_train=examples, max_test=min(500, examples)) for name in tasks),
            space="encoder-mixed",
            budget=Budget(fraction=0.125),
            training=TrainingConfig(steps=steps or 300, max_length=64, seed=seed, device=device),
            compare=("uniform", "random"),
        )
    return SearchConfig(
        model="bundled:smollm2",
        tasks=(TaskConfig(bundled="quran_indonesian", name="indonesian", max_test=4),),
        space="tiny",
        budget=Budget(params=35_136),
        training=TrainingConfig(
            steps=steps or 40, batch_size=4, learning_rate=1e-2, max_length=128, seed=seed, device=device
        ),
        compare=("uniform", "random"),
    )
