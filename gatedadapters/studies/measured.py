"""The function that scores a trial, and its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gatedadapters.config import CorruptionConfig, SearchConfig
from gatedadapters.config.study import StudySide

ReportProgress = Callable[[int, float], None]  # (optimiser step, validation accuracy)


@dataclass(frozen=True)
class Measured:
    """The result of one trial, after pruning.

    Attributes:
        scores: accuracy by task, on clean data.
        perturbed: accuracy by task under each perturbation, in the order of the perturbations.
        params: number of parameters that are stored.
        seconds: time spent on training.
    """

    scores: dict[str, float]
    perturbed: tuple[dict[str, float], ...]
    params: int
    seconds: float


class Measure(Protocol):
    """A function that scores one trial: `objective.measure` unless a user gives another."""

    def __call__(
        self,
        search: SearchConfig,
        side: StudySide,
        perturbations: Sequence[CorruptionConfig] = (),
        *,
        split: str = "test",
        report: ReportProgress | None = None,
    ) -> Measured:
        """See `objective.measure`."""
