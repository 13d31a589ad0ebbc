"""Scores from the weights of the maps that paths go to, and from their inputs."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from gatedadapters.allocation.base import PlacementScore
from gatedadapters.allocation.probe import Probe
from gatedadapters.errors import AllocationError
from gatedadapters.paths import Path


class MapScore(PlacementScore):
    """A score that judges a path by the map it goes to, whatever its kind. Of a norm, the map is its gains' diagonal.

    Candidates at one map so get one number per parameter; what tells kinds apart is another score.
    """

    needs_data = False

    def worth(self, probe: Probe) -> dict[str, Tensor]:
        """See `PlacementScore.worth`; `rate` says what one map is worth for each parameter."""
        self.read(probe)
        rates: dict[str, float] = {}
        found = {}
        for key, path in probe.paths.items():
            name = str(path.site.write)
            if name not in rates:
                weight = probe.weight_of(path)
                rates[name] = 0.0 if weight is None else self.rate(probe, path, as_matrix(weight, path))
            found[key] = torch.tensor([rates[name] * probe.unit_params[key]])
        if not any(rates.values()):
            raise AllocationError(
                "this score says nothing of these candidates",
                expected="candidates at maps with weights in 16 bits or more",
                got="none",
                where=f"allocate(score={self.kind!r})",
                fix='use a score that reads what is learned, such as "gain"',
            )
        return found

    def read(self, probe: Probe) -> None:
        """Read the batches, if the score needs them."""
        return None

    @abstractmethod
    def rate(self, probe: Probe, path: Path, weight: Tensor) -> float:
        """The worth of one parameter at the map of `path`, whose weight is (out, in), float32."""


def as_matrix(weight: Tensor, path: Path) -> Tensor:
    """The weight that a path goes to, (out, in), float32: gains as a diagonal, a stack of experts as a tall matrix."""
    weight = weight.detach().float()
    if weight.dim() == 1:
        return torch.diag(weight)
    weight = weight.mT if path.site.transposed else weight
    return weight.reshape(-1, weight.shape[-1])
