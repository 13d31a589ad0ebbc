"""A real encoder, four real tasks, one search under a budget, compared with uniform LoRA and a random structure."""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

from gatedadapters.config import Budget, SearchConfig, TaskConfig, TrainingConfig

TASKS = ("rotten_tomatoes", "subjectivity", "tweets", "medical_specialty")


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--out", type=Path, help="folder for the results (default: quickstart, or the next free name)")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in --out")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="NAME", help=f"bundled tasks ({' '.join(TASKS)})")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps of each of the three runs (300)")
    parser.add_argument("--examples", type=int, default=1500, help="training examples of each task (1500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def configuration(options: argparse.Namespace) -> SearchConfig:
    """The quick start as a configuration like any other."""
    return SearchConfig(
        model="bundled:minilm-l6",
        tasks=tuple(
            TaskConfig(bundled=name, max_train=options.examples, max_test=min(500, options.examples))
            for name in options.tasks
        ),
        space="encoder-mixed",
        budget=Budget(fraction=0.125),
        training=TrainingConfig(steps=options.steps, max_length=64, seed=options.seed, device=options.device),
        compare=("uniform", "random"),
    )


def run(options: argparse.Namespace) -> None:
    """Do it."""
    from gatedadapters.experiments import search as outcome  # training takes seconds to import

    config = configuration(options)
    folder = options.out or next(f for f in map(_name, count(1)) if not f.exists())
    outcome.report(config, folder, outcome.run(config, folder, overwrite=options.overwrite))


def _name(number: int) -> Path:
    return Path("quickstart" if number == 1 else f"quickstart-{number}")
