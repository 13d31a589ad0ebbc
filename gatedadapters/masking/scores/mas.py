"""Sensitivity of the output to each element; needs no labels."""

from __future__ import annotations

from torch import Tensor

from gatedadapters.masking.scores.base import Batch, Loss, Score, ScoringRun
from gatedadapters.masking.scores.losses import output_norms
from gatedadapters.masking.scores.per_example import PerExample


class MemoryAwareSynapses(Score):
    """`mean_i |∂‖f(x_i)‖² / ∂θ|` over **examples** i. f are the logits, or the last hidden state of a model without a
    head.

    Quantity: how far the output moves with the element. Reduction: mean over examples of absolute values; the squared
    norm is the mean over an example's tokens, without padding. Sign: at least 0; large means important. A `loss` given
    by the caller replaces the squared norm.

    References:
        Aljundi et al. 2018, "Memory Aware Synapses", arXiv 1711.09601, equation 3 with the squared norm of section 4.1.
    """

    kind = "mas"

    def default_loss(self) -> Loss:
        """The squared norm of the output."""
        return output_norms

    def begin(self, run: ScoringRun) -> None:
        """Start without knowledge of which parameters can be done for all examples at once."""
        self._per_example = PerExample(run, _magnitudes)

    def batch(self, run: ScoringRun, batch: Batch) -> None:
        """Add the gradients of all examples of the batch; see `PerExample`."""
        self._per_example.add(batch)

    def finish(self, run: ScoringRun) -> None:
        """Mean over examples."""
        self._per_example.finish()


def _magnitudes(grads: Tensor) -> Tensor:
    return grads.abs()
