"""Random cores with an exact number of elements: the control that every selection needs."""

from __future__ import annotations

from pydantic import Field

from gatedadapters.continual.core import Core, random_core
from gatedadapters.continual.stage import Stage, StreamSetup
from gatedadapters.continual.strategies.selected import Selected
from gatedadapters.errors import ConfigError


class RandomCores(Selected):
    """Tensors (or elements) are drawn anew for each task; see `random_core`.

    Attributes:
        elements: how many elements each task's core has, in the order of the stream; for a control, those of the
            selection it is compared with. Default: `core.share` of all elements that may be chosen.
    """

    kind = "random"
    elements: tuple[int, ...] | None = Field(None, min_length=1)

    def check(self, setup: StreamSetup) -> None:
        """Check that there is one number for each task.

        Raises:
            ConfigError: there is not, or a number is larger than the model.
        """
        super().check(setup)
        size = self._size(setup)
        if self.elements is not None and (
            len(self.elements) != len(setup.tasks) or not all(0 < n <= size for n in self.elements)
        ):
            raise ConfigError(
                expected=f"{len(setup.tasks)} numbers in 1..{size:,}",
                got=self.elements,
                where="strategy random: elements",
                fix="give one number of elements per task",
            )

    def check_share(self, setup: StreamSetup) -> None:
        """Check that exclusive cores fit into the model; where `elements` are given, their sum counts.

        Raises:
            ConfigError: they do not fit.
        """
        if self.elements is None:
            super().check_share(setup)
        elif self.core.overlap == "exclude_previous" and sum(self.elements) > self._size(setup):
            raise ConfigError(
                "exclusive cores of these sizes do not fit into the model",
                expected=f"{self._size(setup):,} elements together",
                got=f"{sum(self.elements):,}",
                where="strategy random: elements",
                fix="lower them, or overlap: allow",
            )

    def select(self, stage: Stage) -> Core:
        """Draw a core."""
        previous = self.taken(stage)
        if self.elements is not None:
            count = self.elements[stage.index]
        else:  # shares are rounded: the last of several exclusive cores may have a few elements less
            size = self._size(stage)
            left = size - sum(core.elements for core in previous)
            count = max(1, min(round(self.core.share * size), left))
        return random_core(
            stage.tensors,
            count,
            granularity=self.core.granularity,
            previous=previous,
            seed=stage.seed_for("random"),
            candidates=self.candidates(stage.tensors),
        )

    def _size(self, setup: StreamSetup) -> int:
        """How many elements may be chosen."""
        return sum(setup.tensors[name].numel for name in self.candidates(setup.tensors))
