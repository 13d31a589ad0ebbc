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

    def select(self, run: Run, index: int) -> tuple[Core, float]:
        """By the task's probe, and for `cosine` by the others'."""
        probes, at = self._probes, index
        if self.probe.start == "current":
            probes, at = [run.probe(index, self.probe, elements=self._by_element)], 0
        core = select_core(
            self.candidates(run), probes, at, kind=self.quantity, share=self.core.share,
            granularity=self.core.granularity, exclude=self.previous,
        )  # fmt: skip
        return core, probes[at].record.seconds

    @property
    def _by_element(self) -> bool:
        return self.core.granularity == "element" and self.quantity == "l2_fisher"
