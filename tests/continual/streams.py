"""The tiny stream of the contract as the tests of this folder use it, also across processes."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gatedadapters as ga
from gatedadapters.continual import Strategy, StreamResult, fitting, strategy_kinds
from gatedadapters.continual.states import state_of
from gatedadapters.continual.strategies import resolve
from gatedadapters.testing.strategy_contract import finished_stream
from gatedadapters.testing.streams import CLASSES, TRAINING, CountingCollate, tiny_tasks
from gatedadapters.testing.streams import tiny_classifier as classifier
from gatedadapters.testing.streams import tiny_rows as rows

RESUMED = TRAINING.model_copy(update={"checkpoint_steps": 2})
PROBE = {"steps": 2, "batch_size": 4, "fisher_batches": 2, "learning_rate": 1e-3}
OPTIONS: dict[str, dict[str, Any]] = {
    "l2_fisher": {"probe": PROBE},
    "cosine": {"probe": PROBE},
    "lota": {"probe": PROBE},
    "ewc": {"fisher_batches": 2, "fisher_batch_size": 4},
    "gated": {"search_steps": 4},
}
KINDS = tuple(strategy_kinds())

collate = CountingCollate()


def options(kind: str, **changes: Any) -> dict[str, Any]:
    """A strategy with quick options; `carried` takes the cores of the finished stream of `l2_fisher`."""
    given = OPTIONS.get(kind, {})
    if kind == "carried":
        given = {"source": str(finished_stream(strategy("l2_fisher")).result.folder)}
    return {"kind": kind, **given, **changes}


def strategy(kind: str) -> Strategy:
    """The same as an object."""
    return resolve(options(kind))


def tasks(**changes: Any) -> list[ga.Task]:
    """Three classification tasks; `changes` replace fields of the second."""
    first, second, third = tiny_tasks(collate)
    return [first, replace(second, **changes), third]


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers."""
    return {name: value.detach().clone() for name, value in state_of(model)}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of what differs in any bit."""
    assert before.keys() == after.keys()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def main() -> None:
    """Run a stream in a process of its own: `streams.py FOLDER KIND`."""
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    training = TRAINING.model_copy(update={"checkpoint_steps": 1})
    print("started", flush=True)
    result = ga.run_stream(classifier(), tasks(), options(kind), training=training, folder=folder)
    print(" ".join(stage.state for stage in result.stages))
    sys.stdout.flush()
    os._exit(0)  # skips a slow shutdown


if __name__ == "__main__":
    main()


def run(model: Any, kind: str, folder: Path | None = None, **changes: Any) -> StreamResult:
    return ga.run_stream(model, tasks(), options(kind, **changes), training=TRAINING, folder=folder)


class interrupted:  # noqa: N801
    """Within this context the step of that number raises."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0

    def __enter__(self) -> None:
        self.original = fitting._StageTraining.training_step

        def step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
            return self.original(trainer, *args, **kwargs)

        fitting._StageTraining.training_step = step  # type: ignore[method-assign]

    def __exit__(self, *args: object) -> None:
        del fitting._StageTraining.training_step


__all__ = [
    "CLASSES",
    "KINDS",
    "OPTIONS",
    "PROBE",
    "RESUMED",
    "TRAINING",
    "classifier",
    "collate",
    "interrupted",
    "moved",
    "options",
    "rows",
    "run",
    "state",
    "strategy",
    "tasks",
]
