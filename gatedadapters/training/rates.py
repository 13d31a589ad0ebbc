"""Learning rates of a gated training: of gates, of paths while candidates close, and after the prune."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from gatedadapters.config import Schedule
from gatedadapters.gates import Pressure


class ConstantFactor:
    """The learning-rate factor of gates, which is 1 throughout."""

    def __call__(self, step: int) -> float:
        """Return 1 at every step."""
        return 1.0


def rewound(
    factor: Callable[..., float], prune: int, peak: int, total: int, *, warmup: int = 0
) -> Callable[[int], float]:
    """A learning-rate factor that repeats its descent after the prune, compressed into the remaining steps.

    The paths that survive a prune need a high enough rate to recover; the end of a single descent is too low.

    Args:
        factor: learning-rate factor by step.
        prune: step of the prune.
        peak: step at which the descent of `factor` begins.
        total: number of steps.
        warmup: steps after the prune in which the rate rises to that again.

    References:
        Renda, Frankle, Carbin 2020, "Comparing Rewinding and Fine-tuning in Neural Network Pruning", arXiv 2003.02389:
        learning-rate rewinding.
    """

    def at(step: int) -> float:
        if step < prune:
            return factor(step)
        since = step - prune
        return min(1.0, (since + 1) / (warmup + 1)) * factor(peak + since / max(1, total - prune) * (total - peak))

    return (
        at  # schedulers save the state of callable objects, but not of functions; safe readers accept only the latter
    )


def rewarmed(prune: int, peak: int, total: int) -> int:
    """Number of warm-up steps after the prune of a search that began with a probe.

    It is the length of the first warm-up, or a twentieth of the remaining steps if that is more. Without it, one of
    three searches on SmolLM2 diverged after its prune: Adam's averages come from the gradients of the dense model.
    """
    return max(peak, math.ceil(0.05 * (total - prune)))


def shared_out(factor: Callable[..., float], pressure: Pressure, total: int) -> Callable[[int], float]:
    """A learning-rate factor for paths, multiplied by `Pressure.kept_share`.

    Under Adam every open unit moves by about the learning rate, and the contributions of all units at a point add up.
    So with all candidates open the model's output would move many times as fast as with the few that will stay, which
    the rate is meant for.
    """
    return lambda step: factor(step) * pressure.kept_share(step / total)


def split_groups(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[int]:
    """Move `parameters` into parameter groups of their own.

    Each new group has the options of the group that its parameters come from.

    Returns:
        The indices of the groups that hold `parameters`.
    """
    wanted = {id(p) for p in parameters}
    found = []
    for index, group in enumerate(list(optimizer.param_groups)):
        own = [p for p in group["params"] if id(p) in wanted]
        if not own:
            continue
        if len(own) == len(group["params"]):
            found.append(index)
            continue
        group["params"] = [p for p in group["params"] if id(p) not in wanted]
        found.append(len(optimizer.param_groups))
        optimizer.add_param_group({**group, "params": own})
    return found


def default_gate_rate(schedule: Schedule, total_steps: int, *, probed: int = 0) -> float:
    """The rate at which Adam crosses the useful range of log alpha, about 8, within the ramp; in [0.01, 0.3].

    Gates that start from a probe learn more slowly, because a batch of the probe counts as much as a step of the ramp:
    the rate is multiplied by ramp / (ramp + probed), both in steps.

    Args:
        schedule: of the penalty.
        total_steps: of the training.
        probed: batches of the probe.
    """
    ramp = max(1.0, (schedule.ramp - schedule.warmup) * total_steps)
    return min(0.3, max(0.01, 8.0 / ramp)) * ramp / (ramp + probed)
