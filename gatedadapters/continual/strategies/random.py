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
        size = self._size(run)
        if self.elements is not None and (
            len(self.elements) != len(run.stream) or not all(0 < n <= size for n in self.elements)
        ):
            raise ConfigError(
                expected=f"{len(run.stream)} numbers in 1..{size:,}",
                got=self.elements,
                where="strategy random: elements",
                fix="give one number of elements per task",
            )

    def check_share(self, run: Run) -> None:
        """Of numbers given in place of a share, their sum counts.

        Raises:
            ConfigError: exclusive cores of these sizes do not fit into what may be chosen.
        """
        if self.elements is None:
            super().check_share(run)
        elif self.core.overlap == "exclude_previous" and sum(self.elements) > self._size(run):
            raise ConfigError(
                "exclusive cores of these sizes do not fit into the model",
                expected=f"{self._size(run):,} elements together",
                got=f"{sum(self.elements):,}",
                where="strategy random: elements",
                fix="lower them, or overlap: allow",
            )

    def select(self, run: Run, index: int) -> Core:
        """By chance."""
        if self.elements is not None:
            count = self.elements[index]
        else:  # shares are rounded: the last of exclusive ones may find a few elements less
            size = self._size(run)
            taken = sum(core.elements for core in self.previous)
            count = max(1, min(round(self.core.share * size), size - taken))
        return random_core(
            run.infos,
            count,
            granularity=self.core.granularity,
            previous=self.previous,
            seed=phase_seed(run.seed, f"random {run.stream[index].name}"),
            candidates=self.candidates(run),
        )

    def _size(self, run: Run) -> int:
        """How many elements may be chosen."""
        return sum(run.infos[name].numel for name in self.candidates(run))
