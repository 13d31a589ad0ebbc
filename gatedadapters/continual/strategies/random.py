"""Cores by chance, of exactly as many elements: the control that every selection needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from gatedadapters.continual.core import Core, random_core
from gatedadapters.continual.fitting import phase_seed
from gatedadapters.continual.strategies.selected import Selected
from gatedadapters.errors import ConfigError

if TYPE_CHECKING:
    from gatedadapters.continual.runner import Run


class Random(Selected):
    """Tensors (or elements) drawn anew for each task; see `random_core`.

    Attributes:
        elements: how many each task's core has, in the order of the stream: what the selection compared with took.
            Default: `core.share` of all that may be chosen.
    """

    kind = "random"
    elements: tuple[int, ...] | None = Field(None, min_length=1)

    def check(self, run: Run) -> None:
        """See that every task has its number.

        Raises:
            ConfigError: it has not, or more elements are asked for than there are.
        """
        super().check(run)
        size = sum(info.numel for info in self.candidates(run).values())
        if self.elements is not None and (
            len(self.elements) != len(run.stream) or not all(0 < n <= size for n in self.elements)
        ):
            raise ConfigError(
                expected=f"{len(run.stream)} numbers in 1..{size:,}", got=self.elements,
                where="strategy random: elements", fix="give one number of elements per task",
            )  # fmt: skip

    def select(self, run: Run, index: int) -> tuple[Core, float]:
        """By chance."""
        candidates = self.candidates(run)
        size = sum(info.numel for info in candidates.values())
        count = self.elements[index] if self.elements is not None else max(1, round(self.core.share * size))
        seed = phase_seed(run.seed, f"random {run.stream[index].name}")
        core = random_core(candidates, count, granularity=self.core.granularity, seed=seed, exclude=self.previous)
        return core, 0.0
