"""What there is to run: one cell for each training run, and the learning rate of each arm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.common.store import Result, Store
from benchmarks.common.tuning import best

STORE = Store("search_quality")
PEFT_ARMS = ("adalora", "eva")
ARMS = ("searched", "dense", "random", "uniform", "attention", "svd", "searched-mixed", "random-mixed", *PEFT_ARMS)
LORA = ("searched", "random", "uniform", "attention", "svd")
RATES = (5e-3, 1e-2, 2e-2)
DENSE_RATES = (6e-4, 1.2e-3, 2.5e-3)  # lower: eight times the ranks
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100


@dataclass(frozen=True)
class Cell:
    """One training run: everything its result depends on."""

    task: str
    budget: float
    arm: str
    rate: float
    seed: int
    steps: int = 240
    model: str = "minilm-l3"
    train: int = 6000
    split: str = "test"

    @property
    def name(self) -> str:
        """Its name among the results."""
        fields = (
            *(self.model, self.task, f"{self.budget:.5f}", self.arm),
            *(f"{self.rate:g}", self.steps, self.split, self.seed),
        )
        return "_".join(map(str, fields))


def read(cell: Cell) -> Result | None:
    """A stored result, if there is one."""
    return STORE.read(cell.name)


@dataclass(frozen=True)
class Comparison:
    """Arms compared on one task at one budget, each with the rate that was best for it on validation data.

    Rates are tuned on this task at this budget, or carried over from another comparison for the arms tuned there.
    """

    task: str
    budget: float
    arms: tuple[str, ...]
    rates_of: Comparison | None = None

    def rate(self, arm: str, result_of: Callable[[Cell], Result | None] = read) -> float | None:
        """The arm's tuned rate, from a seed that the comparison does not use; None where a cell is missing."""
        if self.rates_of is not None and arm in self.rates_of.arms:
            return self.rates_of.rate(arm, result_of)
        rates = DENSE_RATES if arm == "dense" else RATES
        cells = [Cell(self.task, self.budget, arm, rate, TUNING_SEED, split="validation") for rate in rates]
        found = best(cells, result_of, lambda result: result["score"])
        return None if found is None else found.rate


FIRST = Comparison("tweets", 1 / 8, (*LORA, *PEFT_ARMS))
COMPARISONS = (
    FIRST,
    Comparison("newsgroups", 1 / 8, LORA, FIRST),
    Comparison("rotten_tomatoes", 1 / 8, LORA, FIRST),
    Comparison("tweets", 1 / 32, (*LORA, "searched-mixed", "random-mixed"), FIRST),
    Comparison("tweets", 1 / 128, ("searched", "random", "uniform", "attention"), FIRST),
    Comparison("tweets", 1.0, ("dense",)),
)
