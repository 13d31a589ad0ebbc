"""The function that scores a trial, its result, and what the scores are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gatedadapters.config import CorruptionConfig, SearchConfig
from gatedadapters.config.study import StudySide
from gatedadapters.data import kind_of

REPORTS = (0.25, 0.5, 0.75)  # shares of the steps after which a trial reports its validation score
ReportProgress = Callable[[int, float], None]  # (optimiser step, validation score)


@dataclass(frozen=True)
class Metric:
    """What the scores of a study are.

    Attributes:
        name: `accuracy` or `loss`.
        higher_is_better: whether a higher score is better.
        unit: what a score is multiplied by where people read it.
        decimals: of the multiplied score.
        label: how people read it, with the unit.
    """

    name: str
    higher_is_better: bool
    unit: int
    decimals: int
    label: str

    @property
    def sign(self) -> int:
        """A score times its sign is better when it is higher."""
        return 1 if self.higher_is_better else -1

    def text(self, score: float) -> str:
        """A score as people read it, without the unit."""
        return f"{self.unit * score:.{self.decimals}f}"


ACCURACY = Metric("accuracy", True, 100, 1, "accuracy, %")
LOSS = Metric("loss", False, 1, 4, "loss per token")


def metric_of(search: SearchConfig) -> Metric:
    """What the scores of a search are: accuracies of classification tasks, losses where a language model answers."""
    return ACCURACY if all(kind_of(task) == "classification" for task in search.tasks) else LOSS


def report_steps(search: SearchConfig) -> set[int]:
    """The optimiser steps at which a trial reports its validation score: after the prune, before the last step.

    Before the prune, the structure may still change.
    """
    total, prune = search.training.steps, search.schedule.prune
    found = {round(share * total) for share in REPORTS if prune is not None and share > prune}
    return found & set(range(1, total))


@dataclass(frozen=True)
class Measured:
    """The result of one trial, after pruning.

    Attributes:
        scores: accuracy or loss (`metric_of`) by task, on clean data.
        perturbed: the same under each perturbation, in the order of the perturbations.
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
