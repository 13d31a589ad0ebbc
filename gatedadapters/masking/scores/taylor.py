"""First-order effect of removing an element."""

from __future__ import annotations

from torch import Tensor

from gatedadapters.masking.scores.base import Batch, Run, Score, gradients


class Taylor(Score):
    """`mean_b |θ g_b|`, g_b the gradient of a batch's mean loss.

    Quantity: the change of the loss, to first order, if the element were set to 0. Reduction: mean over batches of
    absolute values, so effects of opposite sign in different batches add up; within a batch they cancel. Sign: at least
    0; a large score says important.

    References:
        Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", arXiv 1906.10771, equation 8 without
        the square, per element.
    """

    kind = "taylor"

    def batch(self, run: Run, batch: Batch) -> None:
        """One backward pass."""
        losses = run.losses(batch)
        with gradients(run, lambda name, grad: self._add(run, name, grad)):
            losses.mean().backward()

    @staticmethod
    def _add(run: Run, name: str, grad: Tensor) -> None:
        total = run.totals[name]
        total += grad.mul_(run.parameters[name].detach()).abs_().to(total)

    def finish(self, run: Run) -> None:
        """Mean over batches."""
        for total in run.totals.values():
            total /= run.batches
