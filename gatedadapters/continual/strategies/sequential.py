"""Full fine-tuning, task after task: the baseline that forgets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gatedadapters.continual.strategies.base import Strategy, Tuned

if TYPE_CHECKING:
    from gatedadapters.continual.runner import Run


class Sequential(Strategy):
    """Every element of the backbone is trained on every task."""

    kind = "sequential"

    def tune(self, run: Run, index: int) -> Tuned:
        """Train everything."""
        elements = run.require(run.infos, index)
        return Tuned(elements, run.fit(index))
