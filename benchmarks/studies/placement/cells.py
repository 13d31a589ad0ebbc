"""What there is to run: one cell for each structure and seed, and one for each score."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from benchmarks.common.store import Result, Store


def summary(result: Result) -> Result:
    """What is packed: of a frontier no structures, which take megabytes and follow from its cell; the losses of single
    texts of the structures that scores are judged on alone, which have the common rate and the first seed.
    """
    if "frontier" in result:
        kept = [{name: value for name, value in point.items() if name != "structure"} for point in result["points"]]
        return {**result, "points": kept}
    cell = result.get("cell", {})
    if (cell.get("rate"), cell.get("seed")) == (COMMON_RATE, SEEDS[0]):
        return result
    return {name: value for name, value in result.items() if name != "losses"}


STORE = Store("placement", summary=summary)
COMMON_RATE = 1e-2  # of all kinds of path
RATES = (5e-3, COMMON_RATE, 2e-2)  # of which every arm takes its best
PEFT_RATES = {  # other parameters want others: gains are tuned as they are, vectors by what they multiply
    "peft-norms": (3e-3, 1e-2, 3e-2),
    "peft-ia3": (3e-2, 6e-2, 1.2e-1),
    "peft-lora": (2e-2, 4e-2, 8e-2),
    "peft-adalora": (1e-2, 2e-2, 4e-2),
    "peft-eva": (1e-3, 3e-3, 1e-2),
}
SEEDS = (0, 1, 2, 3, 4)
LIBRARY = ("allocated", "searched")  # what the library chooses
GUESSES = ("even:all", "kind:norm", "kind:scale", "kind:lora", "random")
POINT_RATES = (COMMON_RATE / 5, COMMON_RATE)  # the largest structures want less than the common rate
REPEATED = 10  # structures that are trained with every seed; all others with the first


@dataclass(frozen=True)
class Cell:
    """One structure, trained once: everything its result depends on."""

    regime: str
    structure: str
    seed: int = 0
    rate: float = COMMON_RATE

    @property
    def name(self) -> str:
        """Its name among the results."""
        return f"{self.regime}_{self.structure.replace(':', '-')}_{self.rate:g}_{self.seed}"


@dataclass(frozen=True)
class ScoreCell:
    """One score, found once: the worth that it predicts for every structure of a regime."""

    regime: str
    score: str
    seed: int = 0

    @property
    def name(self) -> str:
        """Its name among the results."""
        return f"score_{self.regime}_{self.score}_{self.seed}"


@dataclass(frozen=True)
class ArmCell:
    """One way to come by a structure, carried out and trained once.

    `allocated`: by the score before any training. `searched`: by gates that start from the score. Every other arm is
    a method of peft.
    """

    regime: str
    arm: str
    seed: int = 0
    score: str = "gain"
    rate: float = COMMON_RATE

    @property
    def name(self) -> str:
        """Its name among the results."""
        return f"arm_{self.regime}_{self.arm}_{self.score}_{self.rate:g}_{self.seed}"


@dataclass(frozen=True)
class FrontierCell:
    """The frontier of a regime's candidates: what the probe predicts for eight budgets, and their structures."""

    regime: str
    seed: int = 0

    @property
    def name(self) -> str:
        """Its name among the results."""
        return f"frontier_{self.regime}_{self.seed}"


@dataclass(frozen=True)
class PointCell:
    """One structure of a frontier, trained by itself."""

    regime: str
    number: int
    seed: int = 0
    rate: float = COMMON_RATE

    @property
    def name(self) -> str:
        """Its name among the results."""
        return f"point_{self.regime}_{self.number}_{self.rate:g}_{self.seed}"


@dataclass(frozen=True)
class CostCell:
    """The time of an allocation, of a search, and of a plain training of what it finds, one after the other."""

    regime: str
    seed: int = 0
    steps: int = 120

    @property
    def name(self) -> str:
        """Its name among the results."""
        return f"cost_{self.regime}_{self.steps}_{self.seed}"


AnyCell = Cell | ScoreCell | ArmCell | FrontierCell | PointCell | CostCell


def arm_cell(regime: str, arm: str, seed: int, rate: float) -> Cell | ArmCell:
    """The cell of an arm; a structure's is shared with those that scores are judged on."""
    if arm in LIBRARY:
        return ArmCell(regime, arm, seed, rate=rate)
    if arm.startswith("peft-"):
        return ArmCell(regime, arm, seed, score="", rate=rate)
    return Cell(regime, f"random:{seed}" if arm == "random" else arm, seed, rate)


def tuned(regime: str, arm: str) -> float | None:
    """The rate with the lowest mean loss over the seeds that were trained at every rate; None where there is no such
    seed.
    """
    losses: dict[float, dict[int, float]] = {rate: {} for rate in rates_of(arm)}
    for rate, seed in itertools.product(losses, SEEDS):
        result = read(arm_cell(regime, arm, seed, rate))
        if result is not None:
            losses[rate][seed] = result["loss"]
    return best_rate(losses, rates_of(arm))


def best_rate(losses: Mapping[float, Mapping[int, float]], planned: Sequence[float]) -> float | None:
    """The rate with the lowest mean loss over the seeds that the planned rates share; None where they share none.

    Args:
        losses: by rate and seed; further rates count where they have these seeds.
        planned: the rates that every arm of this kind tries; those without an entry are left out.
    """
    entries = [set(losses[rate]) for rate in planned if rate in losses]
    shared = set.intersection(*entries) if entries else set()
    tried = [rate for rate, seeds in losses.items() if shared <= seeds.keys()]
    return min(tried, key=lambda rate: fmean(losses[rate][seed] for seed in shared)) if shared else None


def rates_of(arm: str) -> tuple[float, ...]:
    """The rates that are tried."""
    return PEFT_RATES.get(arm, RATES)


def cells_of(regime: str, structures: Sequence[str], rate: float = COMMON_RATE) -> list[Cell]:
    """The cells of a regime, in an order of which any beginning says something.

    Args:
        regime: its name.
        structures: names, in the order of `structures.made`.
        rate: of learning.
    """
    half = len(structures) // 2
    once = [Cell(regime, name, SEEDS[0], rate) for name in structures]
    again = [[Cell(regime, name, seed, rate) for name in structures[:REPEATED]] for seed in SEEDS[1:]]
    return [*once[:half], *again[0], *once[half:], *(cell for cells in again[1:] for cell in cells)]


def read(cell: AnyCell) -> Result | None:
    """A stored result, if there is one."""
    return STORE.read(cell.name)
