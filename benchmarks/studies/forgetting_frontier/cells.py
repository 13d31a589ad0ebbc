"""What there is to run: one cell for each training run, which is measured after several numbers of steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.common.store import Store

STORE = Store("forgetting_frontier")
DOMAINS = ("indonesian", "chinese")
STEPS = 40
SHARES = (0.8, 0.95, 0.99)  # of the elements of the linear maps that a mask protects
_WHOLE, _ADAPTERS, _ELEMENTS = (1e-4, 3e-4, 1e-3), (3e-3, 1e-2, 3e-2), (3e-4, 1e-3, 3e-3)
RATES = {
    "full": _WHOLE,
    "lora": _ADAPTERS,
    "random": _ELEMENTS,
    "fisher": _ELEMENTS,
    "norm": _ADAPTERS,
    "replay": _WHOLE,
    "osft": _WHOLE,
    "taylor": _ELEMENTS,
    "talr": _WHOLE,
    "slow": (1e-5, 3e-5),
    "consistency": _ELEMENTS,
    "refreshed": _ELEMENTS,
    "ia3": _ADAPTERS,
    "ewc": _WHOLE,
    "shira": _ELEMENTS,
    "last": _WHOLE,
    "inverse": _ELEMENTS,
    "gates": _ADAPTERS,
    "joint": _ADAPTERS,
}
"""The arms, those that decide first, and the rates of each, the lowest first."""
MASKS = ("random", "taylor", "fisher", "consistency", "refreshed", "shira", "inverse")
SHARED = {**dict.fromkeys(MASKS, SHARES), "osft": (0.5, 0.8, 0.95)}
"""The protected shares of the arms that have one; OSFT's are shares of the singular directions."""


@dataclass(frozen=True)
class Cell:
    """One run: everything its result depends on.

    Attributes:
        protect: the share that is protected; 0 for arms without one.
        steps: of the optimiser. The model is measured after a quarter, a half and all of them.
        choices: whether multiple-choice questions are answered too.
    """

    domain: str
    arm: str
    rate: float
    seed: int
    protect: float = 0.0
    steps: int = STEPS
    choices: bool = False

    @property
    def name(self) -> str:
        """Its name among the results."""
        shared = f"{self.protect:g}" if self.protect else "all"
        asked = ["choices"] if self.choices else []
        return "-".join([self.domain, self.arm, shared, f"{self.rate:g}", str(self.steps), str(self.seed), *asked])

    @property
    def curve(self) -> str:
        """The arm with its share: runs at several rates make one curve."""
        return f"{self.arm} {self.protect:g}" if self.protect else self.arm

    @property
    def measured(self) -> tuple[int, ...]:
        """Numbers of steps after which the model is measured."""
        return tuple(dict.fromkeys(max(1, round(self.steps * part)) for part in (0.25, 0.5, 1.0)))


@dataclass(frozen=True)
class KeepCell:
    """One search for the share that keeps general ability, and one training with what it finds.

    Attributes:
        target: relative rise of the general loss that is allowed.
    """

    domain: str
    seed: int
    target: float = 0.01
    rate: float = 1e-3
    steps: int = 20

    @property
    def name(self) -> str:
        """Its name among the results."""
        return f"keep-{self.domain}-{self.target:g}-{self.rate:g}-{self.steps}-{self.seed}"


def cells_of(
    domain: str,
    arms: Sequence[str],
    seeds: Sequence[int],
    *,
    rates: Sequence[float] | None = None,
    shares: Sequence[float] | None = None,
    steps: int = STEPS,
    choices: bool = False,
) -> Iterator[Cell]:
    """Cells in an order of which any beginning says something: seed by seed; of each arm first the middle rate and the
    middle share, then the other rates, then the other shares.

    Args:
        domain: what is learned.
        arms: in their order.
        seeds: in their order.
        rates: only these of an arm's rates; default: all.
        shares: only these of an arm's shares; default: all.
        steps: see `Cell`.
        choices: see `Cell`.
    """
    chosen = {
        arm: (
            [rate for rate in _middle_first(RATES[arm]) if rates is None or rate in rates],
            [share for share in _middle_first(SHARED.get(arm, (0.0,))) if shares is None or share in (0.0, *shares)],
        )
        for arm in arms
    }
    for seed in seeds:
        for share_index in range(3):
            for rate_index in range(3):
                for arm, (of_rate, of_share) in chosen.items():
                    if rate_index < len(of_rate) and share_index < len(of_share):
                        rate, share = of_rate[rate_index], of_share[share_index]
                        yield Cell(domain, arm, rate, seed, share, steps, choices)


def _middle_first(values: Sequence[float]) -> list[float]:
    middle = len(values) // 2
    return [values[middle], *values[:middle], *values[middle + 1 :]]
