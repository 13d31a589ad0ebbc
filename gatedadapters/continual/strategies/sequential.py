"""Full fine-tuning, task after task: the baseline that forgets."""

from __future__ import annotations

from gatedadapters.continual.stage import Stage
from gatedadapters.continual.strategies.base import Strategy, TunedStage


class Sequential(Strategy):
    """Every element of the backbone is trained on every task."""

    kind = "sequential"

    def tune(self, stage: Stage) -> TunedStage:
        """Train everything."""
        elements = stage.train_only(stage.tensors)
        return TunedStage(elements, stage.fit())
