"""Diagonal of the empirical Fisher information."""

from __future__ import annotations

from torch import Tensor

from gatedadapters.masking.scores.base import Batch, Score, ScoringRun
from gatedadapters.masking.scores.per_example import PerExample


class Fisher(Score):
    """`mean_i g_i²` over **examples** i, g_i the gradient of the example's own loss.

    Quantity: the diagonal of the empirical Fisher information, with the labels of the data. Reduction: mean over
    examples. (Squares of batch means would shrink with the batch size.) Sign: at least 0; large means important.

    References:
        Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", arXiv 1612.00796, equation 3.
    """

    kind = "fisher"

    def begin(self, run: ScoringRun) -> None:
        """Start without knowledge of which parameters can be done for all examples at once."""
        self._per_example = PerExample(run, _squares)

    def batch(self, run: ScoringRun, batch: Batch) -> None:
        """Add the gradients of all examples of the batch; see `PerExample`."""
        self._per_example.add(batch)

    def finish(self, run: ScoringRun) -> None:
        """Mean over examples."""
        self._per_example.finish()


def _squares(grads: Tensor) -> Tensor:
    return grads.square()
