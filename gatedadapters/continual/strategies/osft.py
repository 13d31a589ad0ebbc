"""Orthogonal subspace fine-tuning: each task moves whole matrices, in the singular directions that are still free."""

from __future__ import annotations

import time

from pydantic import Field

from gatedadapters.continual.stage import Stage
from gatedadapters.continual.strategies.base import Strategy, TunedStage
from gatedadapters.masking import apply_subspace


class OSFT(Strategy):
    """Task i of n is tuned with a share i / n (i from 0) of the singular directions of every matrix protected, those of
    the largest singular values. The directions are those of the matrices as the task before left them, so nothing is
    stored from task to task.

    Attributes:
        start: share that is protected in the first task already, for what the model knew before the stream. The shares
            then rise from there to `start + (1 - start) (n - 1) / n`.

    References:
        Nayak et al. 2025, "Sculpting Subspaces", arXiv 2504.07097: a sequence of n known tasks protects i / n of the
        capacity in task i. The paper's shares differ between layers; here they are equal.
    """

    kind = "osft"
    start: float = Field(0.0, ge=0, lt=1)

    def tune(self, stage: Stage) -> TunedStage:
        """Find the free directions, train in them, and leave the result in the matrices."""
        began = time.perf_counter()
        share = self.start + (1 - self.start) * stage.index / len(stage.tasks)
        subspace = apply_subspace(stage.model, protect=share, heads=sorted(stage.all_heads))
        finding = time.perf_counter() - began
        stage.train_heads()
        seconds = stage.fit()
        subspace.merge()
        return TunedStage(subspace.params, seconds, finding)
