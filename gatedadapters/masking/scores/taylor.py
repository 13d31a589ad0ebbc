"""First-order effect of removing an element."""

from __future__ import annotations

from torch import Tensor

from gatedadapters.masking.scores.base import BatchScore


class Taylor(BatchScore):
    """`mean_b |θ g_b|`, g_b the gradient of a batch's mean loss.

    Quantity: the change of the loss, to first order, if the element were set to 0. Reduction: mean over batches of
    absolute values, so effects of opposite sign in different batches add up; within a batch they cancel. Sign: at least
    0; a large score says important.

    References:
        Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv 1906.10771, equation 8 without
        the square, per element.
    """

    kind = "taylor"

    def value(self, grad: Tensor, parameter: Tensor) -> Tensor:
        """|θ g|."""
        return grad.mul_(parameter).abs_()
