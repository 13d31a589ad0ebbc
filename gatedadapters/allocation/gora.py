"""The sensitivity of a weight by which GoRA chooses ranks."""

from __future__ import annotations

from torch import Tensor

from gatedadapters.allocation.gradients import Evidence, GradientScore


class GoRA(GradientScore):
    """`mean |W ⊙ mean_b G_b|` of the whole matrix; its ranks then share one number in proportion.

    GoRA gives every matrix a rank in proportion to this number. Filling a budget greedily with a k-th rank worth a k-th
    of the first gives the same proportions.

    References:
        He et al. 2025, "GoRA: Gradient-driven Adaptive Low Rank Adaptation", arXiv 2502.12171 (read in summary): the
        importance of a matrix is the mean of |W ⊙ G|, and ranks follow it.
    """

    kind = "gora"

    def units(self, evidence: Evidence, params: float) -> Tensor:
        """One number for the matrix, whatever the cost of a rank."""
        return evidence.average((evidence.mean * evidence.weight).abs())
