"""What selections by probe share: a warm start of each task, from the base or when it comes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import PrivateAttr

from gatedadapters.config import CoreConfig, ProbeConfig
from gatedadapters.continual.core import Core, Kind, select_core
from gatedadapters.continual.probing import Probe
from gatedadapters.continual.strategies.selected import Selected

if TYPE_CHECKING:
    from gatedadapters.continual.runner import Run


class Probed(Selected):
    """The core is what a probe of the task says by the quantity `quantity`; see `select_core`."""

    quantity: ClassVar[Kind]
    probe: ProbeConfig = ProbeConfig()
    core: CoreConfig = CoreConfig()
    _probes: list[Probe] = PrivateAttr(default_factory=list)

    def begin(self, run: Run) -> None:
        """Probe every task from the base, where the probes start there."""
        super().begin(run)
        self._probes = []
        if self.probe.start == "base":
            self._probes = [run.probe(i, self.probe, elements=self._by_element) for i in range(len(run.stream))]

    def prepare(self, run: Run, index: int) -> float:
        """Probe the task from the current model, where the probes start there."""
        if self.probe.start == "current":
            self._probes = [run.probe(index, self.probe, elements=self._by_element)]
        return self._probes[self._place(index)].record.seconds

    def select(self, run: Run, index: int) -> Core:
        """By the task's probe, and for `cosine` by the others'."""
        return select_core(
            run.infos,
            self._probes,
            self._place(index),
            kind=self.quantity,
            share=self.core.share,
            granularity=self.core.granularity,
            previous=self.previous,
            candidates=self.candidates(run),
        )

    def _place(self, index: int) -> int:
        """Of a task's probe among those that are there."""
        return 0 if self.probe.start == "current" else index

    @property
    def _by_element(self) -> bool:
        return self.core.granularity == "element" and self.quantity == "l2_fisher"
