"""Diagonal of the empirical Fisher information."""

from __future__ import annotations

from torch import Tensor

from gatedadapters.masking.scores.base import Batch, Run, Score
from gatedadapters.masking.scores.per_example import PerExample


class Fisher(Score):
    """`mean_i g_i²` over **examples** i, g_i the gradient of the example's own loss.

    Quantity: the diagonal of the empirical Fisher information (labels from the data). Reduction: mean over examples;
    squares of batch means, which shrink with the batch size, are something else. Sign: at least 0; a large score says
    important.

    References:
        Kirkpatrick et al. 2017, "Overcoming catastrophic forgetting in neural networks", arXiv 1612.00796, equation 3.
    """

    kind = "fisher"

    def begin(self, run: Run) -> None:
        """Nothing is known yet of how the model treats its examples."""
        self._per_example = PerExample(run, _squares)

    def batch(self, run: Run, batch: Batch) -> None:
        """One backward pass; see `PerExample`."""
        self._per_example.add(batch)

    def finish(self, run: Run) -> None:
        """Mean over examples."""
        self._per_example.finish()


def _squares(grads: Tensor) -> Tensor:
    return grads.square()
