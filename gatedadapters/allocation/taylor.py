"""First-order change of the loss if weights were removed."""

from __future__ import annotations

from torch import Tensor

from gatedadapters.allocation.gradients import Evidence, GradientScore


class Taylor(GradientScore):
    """`mean |mean_b g_b · w|` over the elements of the weight that a path adds to; w = 1 for factors and shifts.

    References:
        Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv 1906.10771, equation 3.
    """

    kind = "taylor"

    def units(self, evidence: Evidence, params: float) -> Tensor:
        """A density, times the parameters of a unit."""
        return params * evidence.average((evidence.mean * evidence.weight).abs())
