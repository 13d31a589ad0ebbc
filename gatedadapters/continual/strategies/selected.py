"""What strategies share that tune a selected core: probe, select, tune it alone, merge."""

from __future__ import annotations

import time
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import PrivateAttr

from gatedadapters.config import CoreConfig
from gatedadapters.continual.core import Core, load_core, save_core
from gatedadapters.continual.strategies.base import Strategy, Tuned
from gatedadapters.continual.tensors import TensorInfo
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
        if self.core.overlap == "exclude_previous" and self.core.share * len(run.stream) > 1:
            raise ConfigError(
                "exclusive cores of this size do not fit into the model",
                expected=f"share of at most 1/{len(run.stream)}", got=self.core.share, where=f"{self.kind}: core.share",
                fix="lower it, or overlap: allow",
            )  # fmt: skip

    def begin(self, run: Run) -> None:
        """Nothing is selected yet."""
        self._cores = []

    @abstractmethod
    def select(self, run: Run, index: int) -> tuple[Core, float]:
        """The core of a task, and the seconds of probing that it took."""

    def tune(self, run: Run, index: int) -> Tuned:
        """Select, make the core trainable, train, merge."""
        start = time.perf_counter()
        core, probed = self.select(run, index)
        selecting = time.perf_counter() - start
        delta = apply_mask(run.model, core.mask(run.model, run.all_heads), heads=self._kept(run))
        run.require_heads(index)
        fitted = run.fit(index)
        delta.merge()
        self._cores.append(core)
        return Tuned(core.elements, fitted.seconds, max(probed, selecting), core)

    def candidates(self, run: Run) -> dict[str, TensorInfo]:
        """The tensors that may be chosen, by name."""
        roles = {name: info.role for name, info in run.infos.items()}
        names = chosen(roles, self.core.include, self.core.exclude, where=f"{self.kind}: core")
        return {name: run.infos[name] for name in names}

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
