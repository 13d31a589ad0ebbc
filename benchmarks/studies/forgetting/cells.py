"""What there is to run: one cell for each training run, and the learning rate of each arm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.common.store import Result, Store
from benchmarks.common.tuning import best

STORE = Store("forgetting")
RATES = {  # of the encoder, of a decoder
    "full": ((3e-5, 1e-4, 3e-4), (1e-5, 1e-4)),
    "others": ((6e-4, 2e-3, 6e-3), (2e-4, 2e-3)),
}
WHOLE_TENSORS = ("full", "ewc", "last")
TUNING_SEED = 100
ARMS = (
    *("zero", "full", "last", "lora", "shira", "supertuning", "ewc"),
    *("random", "inverse", "taylor", "fisher", "contrast", "gated", "joint"),
)
DECIDING = ("zero", "full", "lora", "random", "contrast")
STUDIES = ("grimm", "friends", "openbookqa", "medmcqa", "piqa", "encoder")


@dataclass(frozen=True)
class Cell:
    """One run: everything its result depends on."""

    study: str
    arm: str
    rate: float
    seed: int
    protect: float = 0.95
    steps: int = 120
    test: int = 200
    split: str = "test"

    @property
    def name(self) -> str:
        """Its name among the results."""
        fields = (self.study, self.arm, f"{self.rate:g}", self.seed, self.protect, self.steps, self.test, self.split)
        return "-".join(map(str, fields))


def read(cell: Cell) -> Result | None:
    """A stored result, if there is one."""
    return STORE.read(cell.name)


def rates_of(study: str, arm: str) -> tuple[float, ...]:
    """What is tried for an arm; less of decoders, whose cells take minutes."""
    rates = RATES["full" if arm in WHOLE_TENSORS else "others"]
    return (0.0,) if arm == "zero" else rates[study != "encoder"]


def tuned_rate(
    study: str, arm: str, options: dict[str, Any], result_of: Callable[[Cell], Result | None] = read
) -> float | None:
    """The rate with the best mean of domain and general score on validation data, from a seed that the comparison does
    not use. By the domain's score alone every arm is driven to where it forgets most.
    """
    cells = [Cell(study, arm, rate, TUNING_SEED, split="validation", **options) for rate in rates_of(study, arm)]
    found = best(cells, result_of, lambda result: result["scores"]["domain"] + result["scores"]["general"])
    return None if found is None else found.rate


def stored() -> dict[tuple[str, float], dict[str, dict[int, Result]]]:
    """Test results by (study, protect), arm and seed; each arm at its tuned rate."""
    found: dict[tuple[str, float], dict[str, dict[int, Result]]] = {}
    for result in STORE.results().values():
        cell = Cell(**result["cell"])
        options = {"protect": cell.protect, "steps": cell.steps, "test": cell.test}
        if cell.split == "test" and cell.rate == tuned_rate(cell.study, cell.arm, options):
            found.setdefault((cell.study, cell.protect), {}).setdefault(cell.arm, {})[cell.seed] = result
    return found
