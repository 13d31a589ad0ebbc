"""The condition number of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from gatedadapters.allocation.maps import MapScore
from gatedadapters.allocation.probe import Probe
from gatedadapters.paths import Path


class Kappa(MapScore):
    """One over the ratio of the largest to the smallest singular value of a weight: well-conditioned maps come first.

    References:
        KappaTune, as released: tensors with a low condition number are tuned, because they hold the least specialised
        knowledge. It reads no data.
    """

    kind = "kappa"

    def rate(self, probe: Probe, path: Path, weight: Tensor) -> float:
        """0 for a singular matrix."""
        values = torch.linalg.svdvals(weight)
        return float(values[-1] / values[0]) if float(values[0]) else 0.0
