"""First-order effect of setting an element to zero."""

from __future__ import annotations

from torch import Tensor

from gatedadapters.masking.scores.base import BatchScore


class Taylor(BatchScore):
    """`mean_b |θ g_b|`, where g_b is the gradient of the mean loss of batch b.

    Quantity: the first-order change of the loss if the element were set to 0. Reduction: mean over batches of absolute
    values. Effects of opposite sign add up if they are in different batches, and cancel within a batch. Sign: at least
    0; large means important.

    References:
        Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv 1906.10771, equation 8 without
        the square, per element.
    """

    kind = "taylor"

    def value(self, grad: Tensor, parameter: Tensor) -> Tensor:
        """|θ g|."""
        return grad.mul_(parameter).abs_()
