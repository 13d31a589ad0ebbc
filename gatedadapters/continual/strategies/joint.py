"""Joint training on all tasks at once: what a stream could reach if its tasks did not come one after the other."""

from __future__ import annotations

from typing import Any

from torch.utils.data import ConcatDataset

from gatedadapters.continual.stage import Stage, StreamSetup
from gatedadapters.continual.strategies.base import Strategy, TunedStage
from gatedadapters.continual.tasks import check_mixing


class Joint(Strategy):
    """Full fine-tuning on the data of all tasks shuffled together, for as many steps as all tasks have. There is one
    stage, so that of the metrics only OP is defined.
    """

    kind = "joint"

    def check(self, setup: StreamSetup) -> None:
        """Check that examples of all tasks can be in one batch.

        Raises:
            TaskError: their `collate` functions differ.
        """
        check_mixing(setup.tasks, self.kind)

    def stages(self, setup: StreamSetup) -> int:
        """One."""
        return 1

    def tune(self, stage: Stage) -> TunedStage:
        """Train everything on everything."""
        tasks = stage.tasks
        elements = stage.train_only(stage.tensors, heads_of=range(len(tasks)))
        data: ConcatDataset[Any] = ConcatDataset([task.train for task in tasks])
        return TunedStage(elements, stage.fit(data=data, steps=stage.training.steps * len(tasks)))
