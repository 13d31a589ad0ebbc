"""The exact rise of the loss when groups of trained candidates are closed."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from gatedadapters.allocation.base import PlacementScore
from gatedadapters.allocation.groups import grouped
from gatedadapters.allocation.probe import Probe


class Closing(PlacementScore):
    """What groups of candidates are worth: candidates of one kind at one role, in all blocks.

    After the warm start each group is judged by held-out losses, exactly: the rise when it alone is closed, and the
    fall when it alone is open. The mean of both is its worth: the first misses what others can replace, the second
    what only works together. Worths per parameter shrink towards their mean as far as the held-out examples disagree
    (James and Stein), and within a group all units are worth the same: finer rankings were no better than an even
    spread.

    References:
        Ours. Shapley 1953: the mean of the first and the last marginal contribution approximates the mean over all
        orders. Efron, Morris 1975 for the shrinkage.
    """

    kind = "closing"
    holds_out = True

    def worth(self, probe: Probe) -> dict[str, Tensor]:
        """See `PlacementScore.worth`."""
        probe.warm_start()
        groups = grouped(probe.paths)
        params = {name: sum(probe.params[key] for key in keys) for name, keys in groups.items()}
        names = list(groups)
        each = torch.stack([marginal(probe, groups[name]) for name in names])  # (groups, examples)
        rates = shrunk(each / torch.tensor([params[name] for name in names], dtype=each.dtype)[:, None])
        found = {}
        for name, rate in zip(names, rates.tolist(), strict=True):
            for key in groups[name]:
                units = probe.params[key] / probe.unit_params[key]
                found[key] = torch.full((round(units),), rate * probe.unit_params[key])
        return found


def marginal(probe: Probe, keys: Collection[str]) -> Tensor:
    """What these paths take off the loss of each held-out example, (examples,): mean of the last and first marginal."""
    others = [key for key in probe.paths if key not in set(keys)]
    rise = probe.held_out_losses(keys) - probe.held_out_losses()
    fall = probe.held_out_losses(list(probe.paths)) - probe.held_out_losses(others)
    return (rise + fall) / 2


def shrunk(values: Tensor) -> Tensor:
    """Means over examples, pulled towards the mean of all groups as far as they are noise.

    Args:
        values: (groups, examples).

    Returns:
        (groups,): m + (1 - noise / (noise + signal)) (mean - m), with m the mean over groups, noise the squared
        standard error of a group's mean, and signal the variance between groups beyond the mean noise.
    """
    means = values.mean(1)
    count = values.shape[1]
    if count < 2 or len(means) < 2:
        return means
    noise = values.var(1) / count
    signal = (means.var() - noise.mean()).clamp(min=0.0)
    centre = means.mean()
    return centre + signal / (signal + noise).clamp(min=torch.finfo(values.dtype).tiny) * (means - centre)
