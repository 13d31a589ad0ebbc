"""Joint training on all tasks at once: what a stream could reach if it were none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import ConcatDataset

from gatedadapters.continual.strategies.base import Strategy, Tuned
from gatedadapters.continual.tasks import check_mixing

if TYPE_CHECKING:
    from gatedadapters.continual.runner import Run


class Joint(Strategy):
    """Full fine-tuning on all data shuffled together, for as many steps as all tasks have. One stage, so that only OP
    is defined.
    """

    kind = "joint"

    def check(self, run: Run) -> None:
        """See that the tasks' examples can be in one batch."""
        check_mixing(run.stream.tasks, self.kind)

    def stages(self, run: Run) -> int:
        """One."""
        return 1

    def tune(self, run: Run, index: int) -> Tuned:
        """Train everything on everything."""
        every = range(len(run.stream))
        elements = run.require(run.infos, *every)
        data: ConcatDataset[Any] = ConcatDataset([task.train for task in run.stream])
        return Tuned(elements, run.fit(index, data=data, heads_of=every, length=len(run.stream)))
