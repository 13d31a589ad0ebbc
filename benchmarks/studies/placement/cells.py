"""What there is to run: one cell for each structure and seed, and one for each score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.common.store import Result, Store

STORE = Store("placement")
COMMON_RATE = 1e-2  # of all kinds of path
SEEDS = (0, 1, 2, 3, 4)
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
    the name of a structure.
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


def arms_of(regime: str, seeds: Sequence[int]) -> list[Cell | ArmCell]:
    """What is compared at equal size, seed by seed: two of the library's, two guesses, and a random structure."""
    found: list[Cell | ArmCell] = []
    for seed in seeds:
        found += [ArmCell(regime, arm, seed) for arm in ("allocated", "searched")]
        found += [Cell(regime, name, seed) for name in ("even:all", "kind:norm", f"random:{seed}")]
    return found


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


def read(cell: Cell | ScoreCell | ArmCell) -> Result | None:
    """A stored result, if there is one."""
    return STORE.read(cell.name)
