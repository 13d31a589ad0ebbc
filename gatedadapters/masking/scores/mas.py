"""Sensitivity of the output, without labels."""

from __future__ import annotations

from torch import Tensor

from gatedadapters.masking.scores.base import Batch, Loss, Run, Score
from gatedadapters.masking.scores.losses import output_norms
from gatedadapters.masking.scores.per_example import PerExample


class MemoryAwareSynapses(Score):
    """`mean_i |∂‖f(x_i)‖² / ∂θ|` over **examples** i, f the logits, or the last hidden state of a model without a head.

    Quantity: how far the output moves with the element. Reduction: mean over examples of absolute values; the norm is
    the mean over an example's real tokens. Sign: at least 0; a large score says important. A `loss` given by the caller
    takes the place of the squared norm.

    References:
        Aljundi et al. 2018, "Memory Aware Synapses", arXiv 1711.09601, equation 3 with the squared norm of section 4.1.
    """

    kind = "mas"

    def default_loss(self) -> Loss:
        """The squared norm."""
        return output_norms

    def begin(self, run: Run) -> None:
        """Nothing is known yet of how the model treats its examples."""
        self._per_example = PerExample(run, _magnitudes)

    def batch(self, run: Run, batch: Batch) -> None:
        """One backward pass; see `PerExample`."""
        self._per_example.add(batch)

    def finish(self, run: Run) -> None:
        """Mean over examples."""
        self._per_example.finish()


def _magnitudes(grads: Tensor) -> Tensor:
    return grads.abs()
