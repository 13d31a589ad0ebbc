"""What each group of candidates took off the loss during a short warm start."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from gatedadapters.allocation.base import PlacementScore
from gatedadapters.allocation.groups import grouped
from gatedadapters.allocation.probe import Probe

logger = logging.getLogger(__name__)


class Gain(PlacementScore):
    """The fall of the loss in the warm start, divided among groups: candidates of one kind at one role, in all blocks.

    Every step's movement is multiplied by minus the gradient of the *next* batch, which that step has not seen. So a
    group that only fits the noise of single batches, or overshoots at its rate, gains nothing or loses; and of groups
    that could replace each other, each gets the part that it contributed. The division costs nothing beside the warm
    start: no candidate is closed, no batch is read twice.

    A part of a group gains more than its share of the parameters: `share ** 0.7` of the whole, so that a budget goes to
    the best groups, but not to one alone. A gain counts as far as it is larger than its standard error; a probe that
    lowers the loss nowhere leads to an even spread, with a warning. Within a group all units are worth the same: finer
    rankings were no better than an even spread.

    References:
        Lan, Liu, Zhou, Yosinski 2019, arXiv 1909.01440: loss change allocation. The next batch in place of the same
        one, and groups, are ours.
    """

    kind = "gain"
    returns = 0.7

    def worth(self, probe: Probe) -> dict[str, Tensor]:
        """See `PlacementScore.worth`."""
        probe.warm_start()
        groups = grouped(probe.paths)
        sizes = torch.tensor([sum(probe.params[key] for key in keys) for keys in groups.values()], dtype=torch.float64)
        gains = torch.tensor([probe.gains[key] for keys in groups.values() for key in keys], dtype=torch.float64)
        gains = torch.stack([part.sum(0) for part in gains.split([len(keys) for keys in groups.values()])])
        worths = reliable(gains)
        if float(worths.max()) <= 0:
            logger.warning("the probe lowered the loss nowhere, so its candidates are spread evenly: pass more batches")
            worths = sizes**self.returns
        found = {}
        for keys, worth, size in zip(groups.values(), worths.tolist(), sizes.tolist(), strict=True):
            for key in keys:
                units = round(probe.params[key] / probe.unit_params[key])
                found[key] = torch.full((units,), worth * probe.unit_params[key] / size)
        return found


def reliable(gains: Tensor) -> Tensor:
    """The sums over steps, each times sum ** 2 / (sum ** 2 + error ** 2).

    The standard error of a sum follows from the differences between neighbouring steps, which are noise, not trend.

    Args:
        gains: of each group in each step, (groups, steps).
    """
    pairs = gains[:, : gains.shape[1] // 2 * 2].unflatten(1, (-1, 2))
    noise = (pairs[..., 0] - pairs[..., 1]).square().sum(1)
    total = gains.sum(1)
    trust: Tensor = total.square() / (total.square() + noise).clamp(min=torch.finfo(gains.dtype).tiny)
    return total * trust
