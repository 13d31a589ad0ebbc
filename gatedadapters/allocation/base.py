"""The contract of a placement score.

To add a score:

1. Write one file in this folder with a subclass of `PlacementScore` that fixes `kind`; its docstring says what is
   measured and cites the source.
2. Write `worth`, or for a score from gradients at the start the two methods of `GradientScore`, or for a score from
   weights and inputs the one method of `MapScore`.
3. Add the class to the list in `allocation/registry.py`, or register it from outside with `@allocation.register`.
4. Test it with a subclass of `gatedadapters.testing.PlacementScoreContract`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from gatedadapters.allocation.probe import Probe


class PlacementScore(ABC):
    """Says, before the training proper, how much each candidate unit is worth.

    Attributes:
        kind: the name of the score.
        needs_data: whether the score reads batches.
        holds_out: whether a quarter of the batches is held out from learning, to judge candidates by.
        returns: what a part of a group (one kind at one role) is worth: share ** returns of the whole group. 1: worths
            add up. Below 1, every further unit of a group adds less, so that a budget is spread over groups.
    """

    kind: ClassVar[str]
    needs_data: ClassVar[bool] = True
    holds_out: ClassVar[bool] = False
    returns: ClassVar[float] = 1.0

    @abstractmethod
    def worth(self, probe: Probe) -> dict[str, Tensor]:
        """The worth of what each candidate may add, by the key of its path.

        Args:
            probe: the model with its candidates attached, of one unit each (stacks of experts: one each expert).

        Returns:
            Vectors of finite numbers, (n,), where larger means more useful; numbers of 0 and below say that a unit is
            useless. n may be smaller than the number of units of the candidate; then the k-th unit that shares an
            entry is worth a k-th of it, because later units of a path add less.
        """
