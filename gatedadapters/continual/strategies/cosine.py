"""Cores by specificity: tensors that a task moves in other directions than the other tasks do."""

from __future__ import annotations

from gatedadapters.continual.stage import StreamSetup
from gatedadapters.continual.strategies.probed import Probed
from gatedadapters.errors import ConfigError, TaskError


class Cosine(Probed):
    """The core has the smallest mean cosine between a task's update and the updates of the other tasks; see
    `select_core`. All tasks are probed before the first is tuned, so they must be known by then.

    References:
        arXiv 2605.31025, released code.
    """

    kind = "cosine"
    quantity = "cosine"

    def check(self, setup: StreamSetup) -> None:
        """Check that there are tasks to compare, and that all probes start from the untrained model.

        Raises:
            TaskError: one task.
            ConfigError: probes that start from the current model.
        """
        super().check(setup)
        if len(setup.tasks) < 2:
            raise TaskError(
                "cosine compares the updates of tasks",
                expected="two tasks or more",
                got=len(setup.tasks),
                where="strategy cosine",
                fix="use l2_fisher for a single task",
            )
        if self.probe.start != "base":
            raise ConfigError(
                "updates from different models cannot be compared",
                expected="probe.start: base",
                got=self.probe.start,
                where="strategy cosine",
                fix="leave probe.start out",
            )
