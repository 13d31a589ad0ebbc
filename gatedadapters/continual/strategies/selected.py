"""What strategies share that tune a selected core: probe, select, tune it alone, merge."""

from __future__ import annotations

import time
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PrivateAttr

from gatedadapters.config import CoreConfig
from gatedadapters.continual.core import Core, load_core, save_core, tensors_in
from gatedadapters.continual.strategies.base import Strategy, Tuned
from gatedadapters.errors import ConfigError
from gatedadapters.masking import apply_mask
from gatedadapters.masking.roles import chosen

if TYPE_CHECKING:
    from gatedadapters.continual.runner import Run


class Selected(Strategy):
    """A task moves its core and nothing else: only the core's elements exist as trainable values, so that every other
    bit stays what it was, whatever the optimiser.
    """

    core: CoreConfig = CoreConfig()
    _cores: list[Core] = PrivateAttr(default_factory=list)

    def check(self, run: Run) -> None:
        """See that there is something to choose from, and that exclusive cores leave something for every task.

        Raises:
            MaskError: `core.include` or `core.exclude` matches nothing, or nothing is left.
            ConfigError: exclusive cores are too large.
        """
        self.candidates(run)
        self.check_share(run)

    def check_share(self, run: Run) -> None:
        """See that exclusive cores of the configured share leave something for every task.

        Raises:
            ConfigError: they do not.
        """
        tasks, tensors = len(run.stream), len(self.candidates(run))
        whole = tensors_in(self.core.share, tensors) if self.core.granularity == "tensor" else 0
        if self.core.overlap == "exclude_previous" and (self.core.share * tasks > 1 or whole * (tasks - 1) >= tensors):
            raise ConfigError(
                "exclusive cores of this size do not fit into the model",
                expected=f"cores of at most 1/{tasks} of what may be chosen",
                got=f"share {self.core.share}" + (f", {whole} of {tensors} tensors a task" if whole else ""),
                where=f"{self.kind}: core",
                fix="lower the share, offer more, or overlap: allow",
            )

    def begin(self, run: Run) -> None:
        """Nothing is selected yet."""
        self._cores = []

    def prepare(self, run: Run, index: int) -> float:
        """Measure what the choice needs, where that is not there yet; the seconds that it took, whenever it was."""
        return 0.0

    @abstractmethod
    def select(self, run: Run, index: int) -> Core:
        """The core of a task."""

    def tune(self, run: Run, index: int) -> Tuned:
        """Select, make the core trainable, train, merge."""
        probed = self.prepare(run, index)
        start = time.perf_counter()
        core = self.select(run, index)
        selecting = time.perf_counter() - start
        delta = apply_mask(run.model, core.mask(run.model, run.all_heads), heads=self._kept(run))
        run.require_heads(index)
        seconds = run.fit(index)
        delta.merge()
        self._cores.append(core)
        return Tuned(core.elements, seconds, probed + selecting, core)

    def candidates(self, run: Run) -> tuple[str, ...]:
        """Names of the tensors that may be chosen."""
        roles = {name: info.role for name, info in run.infos.items()}
        return tuple(chosen(roles, self.core.include, self.core.exclude, where=f"{self.kind}: core"))

    @property
    def previous(self) -> list[Core]:
        """What may not be chosen again."""
        return self._cores if self.core.overlap == "exclude_previous" else []

    def remember(self, run: Run, index: int, folder: Path) -> None:
        """The core, as a mask and its scores, and what it was chosen from."""
        save_core(self._cores[-1], folder, run.identity)

    def recall(self, run: Run, index: int, folder: Path) -> None:
        """The core."""
        self._cores.append(load_core(folder))

    @staticmethod
    def _kept(run: Run) -> tuple[str, ...]:
        """Heads of all tasks: none of them is the backbone's."""
        return tuple(sorted(run.all_heads))
