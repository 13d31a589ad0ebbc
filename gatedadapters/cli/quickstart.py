"""A real model learns a language, or several tasks, under a budget, beside uniform LoRA and a random structure."""

from __future__ import annotations

import argparse
from itertools import count
from pathlib import Path

from gatedadapters import experiments
from gatedadapters.config import QUICKSTART_TASKS as TASKS
from gatedadapters.config import quickstart_config


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("--out", type=Path, help="folder for the results (default: quickstart, or the next free name)")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in --out")
    parser.add_argument(
        "--tasks", nargs="*", metavar="NAME", help=f"an encoder and these bundled tasks instead ({' '.join(TASKS)})"
    )
    parser.add_argument("--steps", type=int, help="optimiser steps of each of the three runs (40; 300 with --tasks)")
    parser.add_argument("--examples", type=int, default=1500, help="training examples of each task (1500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def run(options: argparse.Namespace) -> None:
    """Run it and print the result."""
    tasks = () if options.tasks is None else options.tasks or TASKS
    config = quickstart_config(
        tasks=tasks, **{name: getattr(options, name) for name in ("steps", "examples", "seed", "device")}
    )
    names = (Path("quickstart" if number == 1 else f"quickstart-{number}") for number in count(1))
    out = options.out or next(name for name in names if not name.exists())
    print(experiments.search(config, out, overwrite=options.overwrite))
