"""Cores of a smaller model's stream, carried over: the large model is never probed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr

from gatedadapters.config import CoreConfig
from gatedadapters.continual.carry import carry_core
from gatedadapters.continual.core import Core, load_core
from gatedadapters.continual.result import MEMORY, StreamResult, stage_folder
from gatedadapters.continual.strategies.selected import Selected
from gatedadapters.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from gatedadapters.continual.runner import Run


class Carried(Selected):
    """Each task's core is that of the task of the same name in a finished stream of a smaller model, by role and
    relative depth; see `carry_core`.

    Attributes:
        source: folder of that stream, run with a strategy that selects whole tensors.
    """

    kind = "carried"
    source: str
    _carried: dict[str, Core] = PrivateAttr(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """With the last state of the smaller model's stream, which tells it from any other."""
        return {**super().identity(), "source_state": StreamResult.load(self.source).stages[-1].state}

    def check(self, run: Run) -> None:
        """Read and carry the cores.

        Raises:
            ArtifactError: no finished stream of cores.
            ConfigError: options for a choice that was made there, or a task is missing there.
            MaskError: see `carry_core`.
        """
        if self.core != CoreConfig():
            raise ConfigError(
                "carried cores are not chosen anew",
                expected="no core:",
                got=self.core,
                where="strategy carried",
                fix="set it for the smaller model's stream",
            )
        folder = Path(self.source)
        earlier = StreamResult.load(folder)
        missing = [name for name in run.stream.names if name not in earlier.tasks]
        if missing:
            raise ConfigError(
                "the small model's stream lacks a task",
                expected=missing[0],
                got=", ".join(earlier.tasks),
                where=self.source,
                fix="run it with the same tasks",
            )
        if len(earlier.stages) != len(earlier.tasks):
            raise ArtifactError(
                "that stream has no core for each task",
                expected="a strategy that selects cores",
                got=earlier.strategy,
                where=self.source,
                fix="run l2_fisher or cosine there",
            )
        self._carried = {
            name: carry_core(load_core(stage_folder(folder, index) / MEMORY), run.infos)
            for index, name in enumerate(earlier.tasks)
            if name in run.stream.names
        }

    def select(self, run: Run, index: int) -> Core:
        """What was carried."""
        return self._carried[run.stream[index].name]
