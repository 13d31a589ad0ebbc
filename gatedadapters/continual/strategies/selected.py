"""The base of strategies that select a core for each task and tune that core alone."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence

from gatedadapters.config import CoreConfig
from gatedadapters.continual.core import Core, share_of_tensors
from gatedadapters.continual.stage import Stage, StreamSetup
from gatedadapters.continual.strategies.base import Strategy, TunedStage
from gatedadapters.continual.tensors import TensorInfo
from gatedadapters.errors import ConfigError
from gatedadapters.masking import apply_mask
from gatedadapters.masking.roles import matching_parameters


class Selected(Strategy):
    """A task moves its core and nothing else: only the core's elements exist as trainable values, so that every other
    bit stays what it was, whatever the optimiser does.

    Attributes:
        core: how much of the model is a task's core.
    """

    core: CoreConfig = CoreConfig()

    def check(self, setup: StreamSetup) -> None:
        """Check that there is something to choose from, and that exclusive cores leave something for every task.

        Raises:
            MaskError: `core.include` or `core.exclude` matches nothing, or nothing is left to choose from.
            ConfigError: exclusive cores are too large.
        """
        self.candidates(setup.tensors)
        self.check_share(setup)

    def check_share(self, setup: StreamSetup) -> None:
        """Check that exclusive cores of the configured share leave something for every task.

        Raises:
            ConfigError: they do not.
        """
        tasks, tensors = len(setup.tasks), len(self.candidates(setup.tensors))
        whole = share_of_tensors(self.core.share, tensors) if self.core.granularity == "tensor" else 0
        if self.core.overlap == "exclude_previous" and (self.core.share * tasks > 1 or whole * (tasks - 1) >= tensors):
            raise ConfigError(
                "exclusive cores of this size do not fit into the model",
                expected=f"cores of at most 1/{tasks} of what may be chosen",
                got=f"share {self.core.share}" + (f", {whole} of {tensors} tensors a task" if whole else ""),
                where=f"{self.kind}: core",
                fix="lower the share, offer more tensors, or overlap: allow",
            )

    def measure(self, stage: Stage) -> float:
        """Measure what the selection needs, unless that was done before; the seconds that it took, whenever it was."""
        return 0.0

    @abstractmethod
    def select(self, stage: Stage) -> Core:
        """The core of the stage's task."""

    def tune(self, stage: Stage) -> TunedStage:
        """Select the core, make its elements trainable, train them, and write them into the weights."""
        measuring = self.measure(stage)
        start = time.perf_counter()
        core = self.select(stage)
        selecting = time.perf_counter() - start
        delta = apply_mask(stage.model, core.mask(stage.model, stage.all_heads), heads=sorted(stage.all_heads))
        stage.train_heads()
        seconds = stage.fit()
        delta.merge()
        return TunedStage(core.elements, seconds, measuring + selecting, core)

    def candidates(self, tensors: Mapping[str, TensorInfo]) -> tuple[str, ...]:
        """Names of the tensors that may be chosen.

        Raises:
            MaskError: `core.include` or `core.exclude` matches nothing, or nothing is left.
        """
        roles = {name: info.role for name, info in tensors.items()}
        return tuple(matching_parameters(roles, self.core.include, self.core.exclude, where=f"{self.kind}: core"))

    def taken(self, stage: Stage) -> Sequence[Core]:
        """Cores of earlier tasks, where nothing of them may be chosen again."""
        return [earlier.core() for earlier in stage.earlier] if self.core.overlap == "exclude_previous" else []
