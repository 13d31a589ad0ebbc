"""Squared gradients at the start."""

from __future__ import annotations

from torch import Tensor

from gatedadapters.allocation.gradients import Evidence, GradientScore


class Fisher(GradientScore):
    """`mean_b g_b²` over the elements of the tensor that a path changes; g_b is the gradient of a batch's mean loss.

    Squared gradients of small batches are mostly noise, and so is this score; it is here to be compared with.
    """

    kind = "fisher"

    def add(self, total: Tensor, grad: Tensor) -> None:
        """Add the squares."""
        total.addcmul_(grad, grad)

    def units(self, evidence: Evidence, params: float) -> Tensor:
        """A density, times the parameters of a unit."""
        return params * evidence.average(evidence.mean)
