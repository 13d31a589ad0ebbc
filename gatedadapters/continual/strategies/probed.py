"""The base of strategies that select cores by probes: short warm starts of each task, which are undone."""

from __future__ import annotations

from typing import ClassVar

from gatedadapters.config import CoreConfig, ProbeConfig
from gatedadapters.continual.core import Core, CoreKind, select_core
from gatedadapters.continual.probing import Probe
from gatedadapters.continual.stage import Stage
from gatedadapters.continual.strategies.selected import Selected


class Probed(Selected):
    """The core is selected from probes of the tasks by the quantity `quantity`; see `select_core`.

    Attributes:
        probe: how long and how fast each task is probed, and from which model.
        core: how much of the model is a task's core.
    """

    quantity: ClassVar[CoreKind]
    probe: ProbeConfig = ProbeConfig()
    core: CoreConfig = CoreConfig()

    def begin(self, stage: Stage) -> None:
        """Probe every task from the untrained model, where probes start there."""
        if self.probe.start == "base":
            for index in range(len(stage.tasks)):
                self._probe(stage.at(index))

    def measure(self, stage: Stage) -> float:
        """Probe the task from the current model, where probes start there."""
        found = self._probe(stage) if self.probe.start == "current" else Probe.load(stage.probe_folder)
        return found.record.seconds

    def select(self, stage: Stage) -> Core:
        """By the probe of the task, and for `cosine` by those of the other tasks too."""
        indices = range(len(stage.tasks)) if self.probe.start == "base" else (stage.index,)
        return select_core(
            stage.tensors,
            [Probe.load(stage.at(index).probe_folder) for index in indices],
            indices.index(stage.index),
            kind=self.quantity,
            share=self.core.share,
            granularity=self.core.granularity,
            previous=self.taken(stage),
            candidates=self.candidates(stage.tensors),
        )

    def _probe(self, stage: Stage) -> Probe:
        return stage.probe(self.probe, elements=self.core.granularity == "element" and self.quantity == "l2_fisher")
