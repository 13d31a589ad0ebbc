"""Magnitude of the weights; needs no data."""

from __future__ import annotations

from gatedadapters.masking.scores.base import Batch, Score, ScoringRun
from gatedadapters.runtime.sharding import local


class Magnitude(Score):
    """`|θ|`. Quantity: the weight itself. Reduction: none. Sign: at least 0; large means important.

    References:
        Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626.
    """

    kind = "magnitude"
    needs_data = False

    def batch(self, run: ScoringRun, batch: Batch) -> None:
        """Read the weights."""
        for name, total in run.totals.items():
            total.copy_(local(run.parameters[name]).detach().abs())
