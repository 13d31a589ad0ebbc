"""The mean gradient at the start."""

from __future__ import annotations

from torch import Tensor

from gatedadapters.allocation.gradients import Evidence, GradientScore


class Gradient(GradientScore):
    """`|mean_b g_b|`: what a unit of unit norm gains to first order; for ranks, singular values of the mean gradient.

    Noise counts as gain: with few batches large tensors of noisy gradients come first.
    """

    kind = "gradient"

    def units(self, evidence: Evidence, params: float) -> Tensor:
        """The first-order gains."""
        return evidence.gains()
