"""What there is to run: one cell for each way of making one LoRA smaller, and the learning rate of each arm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.common.store import Result, Store
from benchmarks.common.tuning import best

STORE = Store("compress_lora")
MODEL = "minilm-l3"
ARMS = ("whole", "svd", "svd-tuned", "random-tuned", "gated")
TUNED = ("svd-tuned", "gated")  # choose their rates; random-tuned takes that of svd-tuned
TASKS, SHARES = ("newsgroups", "rotten_tomatoes"), (1 / 4, 1 / 8)
RATES = (1e-3, 4e-3)
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100


@dataclass(frozen=True)
class Cell:
    """One way of making one LoRA smaller: everything its result depends on. `share` 1 is the LoRA itself."""

    task: str
    arm: str
    share: float
    seed: int
    rate: float = 0.0
    split: str = "test"

    @property
    def name(self) -> str:
        """Its name among the results."""
        fields = (MODEL, self.task, f"{self.share:.5f}", self.arm, f"{self.rate:g}", self.split, self.seed)
        return "_".join(map(str, fields))


def read(cell: Cell) -> Result | None:
    """A stored result, if there is one."""
    return STORE.read(cell.name)


def tuned_rate(task: str, arm: str, result_of: Callable[[Cell], Result | None] = read) -> float | None:
    """The rate with the best validation score at the smaller size, from a seed that the comparison does not use."""
    cells = [Cell(task, arm, min(SHARES), TUNING_SEED, rate, "validation") for rate in RATES]
    found = best(cells, result_of, lambda result: result["score"])
    return None if found is None else found.rate


def cells_of(task: str, result_of: Callable[[Cell], Result | None] = read) -> list[Cell]:
    """Every cell of a task whose rate is known, seed by seed so that pairs are complete early."""
    tuned = {arm: tuned_rate(task, arm, result_of) for arm in TUNED}
    rates = {"svd": 0.0, **tuned, "random-tuned": tuned["svd-tuned"]}
    cells = []
    for seed in SEEDS:
        cells.append(Cell(task, "whole", 1.0, seed))
        cells += [
            Cell(task, arm, share, seed, rate) for share in SHARES for arm, rate in rates.items() if rate is not None
        ]
    return cells
