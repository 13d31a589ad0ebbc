"""The part of the mean gradient that batches agree on."""

from __future__ import annotations

import torch
from torch import Tensor

from gatedadapters.allocation.gradients import Evidence, GradientScore
from gatedadapters.errors import AllocationError


class Consistency(GradientScore):
    """The first-order gain of the *true* gradient, from the mean of `⟨g_a, g_b⟩` over all pairs of different batches.

    That mean is an unbiased estimate of the squared norm of the true gradient: noise cancels, and batches that disagree
    in sign count against a path. It equals `(‖Σ g‖² - Σ ‖g‖²) / (n (n - 1))`, so one sum of gradients is enough. Ranks
    share its root as the singular values of the mean gradient do.
    """

    kind = "consistency"

    def units(self, evidence: Evidence, params: float) -> Tensor:
        """The root of the unbiased estimate, 0 where it is negative; shared out over ranks."""
        n = evidence.batches
        if n < 2:
            raise AllocationError(
                "agreement needs batches that can agree",
                expected="at least two batches",
                got=f"{n}",
                where=f"allocate(score={self.kind!r})",
                fix="pass more batches",
            )
        norm = float(evidence.total.square().sum())
        agreed = max(0.0, (norm - evidence.squared) / (n * (n - 1)))
        share = agreed**0.5 / max(float(evidence.mean.norm()), torch.finfo(torch.float32).tiny)
        gains: Tensor = evidence.gains() * share
        return gains
