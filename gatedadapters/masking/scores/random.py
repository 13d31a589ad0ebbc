"""The control that every comparison needs."""

from __future__ import annotations

import zlib

import torch

from gatedadapters.masking.scores.base import Batch, Run, Score


class Random(Score):
    """Uniform in (0, 1], a function of the seed, the parameter's name and the position alone.

    Quantity: none, by design. Reduction: none. Sign: above 0.
    """

    kind = "random"
    needs_data = False

    def batch(self, run: Run, batch: Batch) -> None:
        """Draw."""
        for name, total in run.totals.items():
            # 32 bits: a CPU generator reads no more of its seed
            generator = torch.Generator().manual_seed(zlib.crc32(f"{run.seed} {name}".encode()))
            total.copy_(1 - torch.rand(total.shape, generator=generator))
