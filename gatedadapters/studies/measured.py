"""What scores a trial, and what it came to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gatedadapters.config import CorruptionConfig, SearchConfig
from gatedadapters.config.study import Side

Report = Callable[[int, float], None]


@dataclass(frozen=True)
class Measured:
    """What a trial came to, after pruning.

    Attributes:
        scores: accuracy by task.
        perturbed: the same under each perturbation that was asked for, in their order.
        params: what is stored; see `TrainedSide`.
        seconds: of training.
    """

    scores: dict[str, float]
    perturbed: tuple[dict[str, float], ...]
    params: int
    seconds: float


class Measure(Protocol):
    """What scores one trial; `measure` unless a test or a user gives another."""

    def __call__(
        self,
        search: SearchConfig,
        side: Side,
        perturbations: Sequence[CorruptionConfig] = (),
        *,
        split: str = "test",
        report: Report | None = None,
    ) -> Measured:
        """See `measure`."""
