"""The size of weights, a control."""

from __future__ import annotations

from torch import Tensor

from gatedadapters.allocation.maps import MapScore
from gatedadapters.allocation.probe import Probe
from gatedadapters.paths import Path


class Magnitude(MapScore):
    """The root mean square of the weight that a path goes to; a control that reads no data."""

    kind = "magnitude"

    def rate(self, probe: Probe, path: Path, weight: Tensor) -> float:
        """The same for every path at a map."""
        return float(weight.square().mean().sqrt())
