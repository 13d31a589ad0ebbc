"""Replay: full fine-tuning on the new task mixed with stored examples of the earlier ones."""

from __future__ import annotations

import torch
from pydantic import Field
from torch.utils.data import ConcatDataset, Subset

from gatedadapters.continual.stage import Stage, StreamSetup
from gatedadapters.continual.strategies.base import Strategy, TunedStage
from gatedadapters.continual.tasks import check_mixing


class Replay(Strategy):
    """Of every task some examples are kept, drawn at random. Later tasks mix them into their own data, and the heads of
    the earlier tasks are trained along.

    Attributes:
        kept: share of each task's training examples that is kept.
    """

    kind = "replay"
    kept: float = Field(0.1, gt=0, le=1)

    def check(self, setup: StreamSetup) -> None:
        """Check that examples of all tasks can be in one batch.

        Raises:
            TaskError: their `collate` functions differ.
        """
        check_mixing(setup.tasks, self.kind)

    def tune(self, stage: Stage) -> TunedStage:
        """Train everything on the new and the kept examples."""
        elements = stage.train_only(stage.tensors, heads_of=range(stage.index + 1))
        parts = [stage.task.train, *(self._kept_examples(earlier) for earlier in stage.earlier)]
        return TunedStage(elements, stage.fit(data=ConcatDataset(parts)))

    def _kept_examples(self, stage: Stage) -> Subset[object]:
        data = stage.task.train
        generator = torch.Generator().manual_seed(stage.seed_for("kept"))
        count = max(1, round(self.kept * len(data)))
        return Subset(data, torch.randperm(len(data), generator=generator)[:count].tolist())
