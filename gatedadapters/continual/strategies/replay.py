"""Replay: full fine-tuning on the new task mixed with kept examples of the old ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field
from torch.utils.data import ConcatDataset, Subset

from gatedadapters.continual.fitting import phase_seed
from gatedadapters.continual.strategies.base import Strategy, Tuned
from gatedadapters.continual.tasks import check_mixing

if TYPE_CHECKING:
    from gatedadapters.continual.runner import Run


class Replay(Strategy):
    """Every task keeps some examples, drawn by seed, which later tasks mix into their own data; heads of earlier tasks
    are trained along.

    Attributes:
        kept: share of each task's training examples that is kept.
    """

    kind = "replay"
    kept: float = Field(0.1, gt=0, le=1)

    def check(self, run: Run) -> None:
        """See that the tasks' examples can be in one batch."""
        check_mixing(run.stream.tasks, self.kind)

    def tune(self, run: Run, index: int) -> Tuned:
        """Train everything, on what is new and what is kept."""
        elements = run.require(run.infos, *range(index + 1))
        parts = [run.stream[index].train]
        for earlier in range(index):
            data = run.stream[earlier].train
            generator = torch.Generator().manual_seed(phase_seed(run.seed, f"kept {run.stream[earlier].name}"))
            count = max(1, round(self.kept * len(data)))
            parts.append(Subset(data, torch.randperm(len(data), generator=generator)[:count].tolist()))
        return Tuned(elements, run.fit(index, data=ConcatDataset(parts), heads_of=range(index + 1)))
