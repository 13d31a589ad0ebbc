"""Tiny streams of made-up tasks that the tests of this folder share, also across processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gatedadapters as ga
from gatedadapters.config import StreamTrainingConfig
from gatedadapters.continual import StreamResult, fitting, strategy_kinds
from gatedadapters.continual.states import state_of
from gatedadapters.testing.backbones import VOCABULARY, tiny

CLASSES = {"a": 3, "b": 2, "c": 3}
TRAINING = StreamTrainingConfig(
    steps=4,
    batch_size=4,
    learning_rate=1e-2,
    head_learning_rate=2e-2,
    weight_decay=0.1,
    device="cpu",
    checkpoint_steps=None,
)
RESUMED = TRAINING.model_copy(update={"checkpoint_steps": 2})
PROBE = {"steps": 2, "batch_size": 4, "fisher_batches": 2, "learning_rate": 1e-3}
OPTIONS: dict[str, dict[str, Any]] = {
    "l2_fisher": {"probe": PROBE},
    "cosine": {"probe": PROBE},
    "lota": {"probe": PROBE},
    "ewc": {"fisher_batches": 2, "fisher_batch_size": 4},
    "gated": {"search_steps": 4},
}
KINDS = tuple(kind for kind in strategy_kinds() if kind != "carried")  # needs an earlier stream


def options(kind: str, **changes: Any) -> dict[str, Any]:
    """A strategy with quick options."""
    return {"kind": kind, **OPTIONS.get(kind, {}), **changes}


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows of equal length to a batch."""
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def rows(task: int, classes: int, size: int, *, seed: int) -> list[dict[str, Any]]:
    """Examples whose label is a function of the first token."""
    generator = torch.Generator().manual_seed(100 * seed + task)
    found = []
    for _ in range(size):
        tokens = torch.randint(3, VOCABULARY, (8,), generator=generator).tolist()
        label = (tokens[0] + task) % classes
        found.append({"input_ids": tokens, "attention_mask": [1] * 8, "labels": label, "task_ids": task})
    return found


def tasks(**changes: Any) -> list[ga.Task]:
    """Three classification tasks; `changes` replace fields of the second."""
    found = []
    for index, (name, width) in enumerate(CLASSES.items()):
        data: dict[str, Any] = {
            "name": name,
            "train": rows(index, width, 12, seed=0),
            "held_out": rows(index, width, 10, seed=1),
            "collate": collate,
            "classes": tuple("xyz"[:width]),
            "heads": (f"heads.{name}",),
        }
        found.append(ga.Task(**(data | (changes if index == 1 else {}))))
    return found


def classifier(*, dropout: float = 0.1, seed: int = 0) -> ga.MultiTaskClassifier:
    """A tiny BERT with a head per task."""
    backbone, _ = tiny("bert", seed=seed)
    backbone.pooler = None  # no task reads it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ga.MultiTaskClassifier(backbone, CLASSES, dropout=dropout)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    return model.eval()


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
        self.original = fitting._Staged.training_step

        def step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
            return self.original(trainer, *args, **kwargs)

        fitting._Staged.training_step = step  # type: ignore[method-assign]

    def __exit__(self, *args: object) -> None:
        del fitting._Staged.training_step
