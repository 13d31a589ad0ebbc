"""Cores of a smaller model's stream, carried over: the large model is never probed."""

from __future__ import annotations

from typing import Any

from gatedadapters.config import CoreConfig
from gatedadapters.continual.carry import carry_core
from gatedadapters.continual.core import Core
from gatedadapters.continual.result import StreamResult
from gatedadapters.continual.stage import Stage, StreamSetup
from gatedadapters.continual.strategies.selected import Selected
from gatedadapters.errors import ArtifactError, ConfigError


class Carried(Selected):
    """Each task's core is that of the task of the same name in a finished stream of a smaller model, by role and
    relative depth; see `carry_core`.

    Attributes:
        source: folder of that stream, run with a strategy that selects whole tensors.
    """

    kind = "carried"
    source: str

    def identity(self) -> dict[str, Any]:
        """The options, with the last state of the smaller model's stream, which tells it from any other stream."""
        return {**super().identity(), "source_state": StreamResult.load(self.source).stages[-1].state}

    def check(self, setup: StreamSetup) -> None:
        """Read the smaller model's cores and carry them all.

        Raises:
            ArtifactError: `source` holds no finished stream with a core for each task.
            ConfigError: options for a selection that was made there, or a task that is missing there.
            MaskError: see `carry_core`.
        """
        if self.core != CoreConfig():
            raise ConfigError(
                "carried cores are not selected anew",
                expected="no core:",
                got=self.core,
                where="strategy carried",
                fix="set it for the smaller model's stream",
            )
        earlier = StreamResult.load(self.source)
        missing = [name for name in setup.tasks.names if name not in earlier.tasks]
        if missing:
            raise ConfigError(
                "the small model's stream lacks a task",
                expected=missing[0],
                got=", ".join(earlier.tasks),
                where=self.source,
                fix="run it with the same tasks",
            )
        cores = dict(earlier.cores())
        lacking = [name for name in earlier.tasks if name not in cores]
        if lacking:
            raise ArtifactError(
                "that stream has no core for each task",
                expected="a strategy that selects cores",
                got=f"{earlier.strategy}, no core of {lacking[0]}",
                where=self.source,
                fix="run l2_fisher or cosine there",
            )
        for name in setup.tasks.names:
            carry_core(cores[name], setup.tensors)

    def select(self, stage: Stage) -> Core:
        """The smaller model's core of the task, carried over."""
        return carry_core(dict(StreamResult.load(self.source).cores())[stage.task.name], stage.tensors)
