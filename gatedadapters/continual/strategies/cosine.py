"""Cores by specificity: tensors that a task moves in other directions than the other tasks do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gatedadapters.continual.strategies.probed import Probed
from gatedadapters.errors import ConfigError, TaskError

if TYPE_CHECKING:
    from gatedadapters.continual.runner import Run


class Cosine(Probed):
    """The smallest mean cosine between a task's update and those of the others; see `select_core`. All tasks are probed
    before the first is tuned, so they must be known by then.

    References:
        arXiv 2605.31025, released code.
    """

    kind = "cosine"
    quantity = "cosine"

    def check(self, run: Run) -> None:
        """See that there are tasks to compare, and that their probes start at one place.

        Raises:
            TaskError: one task.
            ConfigError: probes that start from the current model.
        """
        super().check(run)
        if len(run.stream) < 2:
            raise TaskError(
                "cosine compares the updates of tasks",
                expected="two tasks or more",
                got=len(run.stream),
                where="strategy cosine",
                fix="use l2_fisher for a single task",
            )
        if self.probe.start != "base":
            raise ConfigError(
                "updates from different models are not compared",
                expected="probe.start: base",
                got=self.probe.start,
                where="strategy cosine",
                fix="leave it out",
            )
