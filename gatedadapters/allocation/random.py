"""Random worths, the control of every comparison."""

from __future__ import annotations

import torch
from torch import Tensor

from gatedadapters.allocation.base import PlacementScore
from gatedadapters.allocation.probe import Probe


class RandomWorth(PlacementScore):
    """Uniform in (0, 1) for every path, per parameter; it reads no data."""

    kind = "random"
    needs_data = False

    def worth(self, probe: Probe) -> dict[str, Tensor]:
        """See `PlacementScore.worth`."""
        generator = torch.Generator().manual_seed(probe.seed)
        return {key: probe.unit_params[key] * torch.rand(1, generator=generator) for key in probe.paths}
