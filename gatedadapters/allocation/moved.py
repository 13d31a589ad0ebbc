"""How far a unit moved in a short warm start."""

from __future__ import annotations

from torch import Tensor

from gatedadapters.allocation.base import PlacementScore
from gatedadapters.allocation.probe import Probe


class Moved(PlacementScore):
    """The size of what a unit has learnt when all candidates have trained together for a few steps (`Path.learned`).

    First-order worths of trained units are stable and yet wrong: after fast steps their sign is that of overshoot. How
    far a unit was pushed is not. A budget is filled in the order of these sizes, not of sizes per parameter, which
    ranked worse.

    References:
        Ours, after the warm start of TRACE, arXiv 2605.31025, which selects tensors by their displacement.
    """

    kind = "moved"

    def worth(self, probe: Probe) -> dict[str, Tensor]:
        """See `PlacementScore.worth`."""
        probe.warm_start()
        return {key: probe.unit_params[key] * path.learned().float().cpu() for key, path in probe.paths.items()}
