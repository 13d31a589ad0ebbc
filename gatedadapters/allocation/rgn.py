"""Relative gradient norm."""

from __future__ import annotations

import torch
from torch import Tensor

from gatedadapters.allocation.gradients import Evidence, GradientScore


class RelativeGradientNorm(GradientScore):
    """`‖mean_b g_b‖ / ‖w‖` of the tensor that a path changes; w = 1 for factors and shifts.

    References:
        Lee et al. 2022, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts", arXiv 2210.11466: Auto-RGN.
    """

    kind = "rgn"

    def units(self, evidence: Evidence, params: float) -> Tensor:
        """A ratio, times the parameters of a unit."""
        smallest = torch.finfo(torch.float32).tiny
        mean, weight = (evidence.average(values.square()).sqrt() for values in (evidence.mean, evidence.weight))
        return params * mean / weight.clamp(min=smallest)
