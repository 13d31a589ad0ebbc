"""Random scores, the control of every comparison."""

from __future__ import annotations

import zlib

import torch

from gatedadapters.masking.scores.base import Batch, Score, ScoringRun
from gatedadapters.runtime.sharding import part_of


class RandomScore(Score):
    """Uniform in (0, 1]. The value depends on the seed, the parameter's name and the position alone.

    Quantity: none. Reduction: none. Sign: above 0.
    """

    kind = "random"
    needs_data = False

    def batch(self, run: ScoringRun, batch: Batch) -> None:
        """Draw all scores."""
        for name, total in run.totals.items():
            # a CPU generator reads 32 bits of its seed
            generator = torch.Generator().manual_seed(zlib.crc32(f"{run.seed} {name}".encode()))
            parameter = run.parameters[name]
            total.copy_(part_of(1 - torch.rand(parameter.shape, generator=generator), parameter))
