"""Squared gradient of an element, from two halves of the data: what agrees counts, noise cancels."""

from __future__ import annotations

import torch
from torch import Tensor

from gatedadapters.errors import MaskError
from gatedadapters.masking.scores.base import Batch, Score, ScoringRun, gradients


class Consistency(Score):
    """`max(0, a b)`, where a and b are the mean gradients over the batches at even and at odd positions.

    Quantity: an unbiased estimate of the squared gradient of the loss, before the maximum is taken. (A mean of squared
    gradients also contains the variance between batches, which says nothing about the loss.) Reduction: mean over
    batches, in each half. Sign: at least 0; large means important. Beside the totals, memory holds a second tensor of
    each parameter's shape.

    References:
        Ours, after the placement score of the same name, which adds up `a b` over a unit.
    """

    kind = "consistency"

    def begin(self, run: ScoringRun) -> None:
        """Start the sum over the second half; the totals hold the first."""
        self._second = {name: torch.zeros_like(total) for name, total in run.totals.items()}

    def batch(self, run: ScoringRun, batch: Batch) -> None:
        """Add the gradient of the batch's mean loss to its half."""
        half = run.totals if run.batches % 2 else self._second

        def add(name: str, grad: Tensor) -> None:
            total = half[name]
            total += grad.to(total)

        losses = run.losses(batch)
        with gradients(run, add):
            losses.mean().backward()

    def finish(self, run: ScoringRun) -> None:
        """Multiply the means of the two halves.

        Raises:
            MaskError: there is only one batch.
        """
        if run.batches < 2:
            raise MaskError(
                "one batch cannot agree with itself",
                expected="at least two batches",
                got="one",
                where=f"score(kind={self.kind!r})",
                fix="pass more batches, or smaller ones",
            )
        counts = (run.batches - run.batches // 2) * (run.batches // 2)
        for name, total in run.totals.items():
            total.mul_(self._second[name]).div_(counts).clamp_(min=0)

    def end(self, run: ScoringRun) -> None:
        """Free the second sum."""
        self._second = {}
