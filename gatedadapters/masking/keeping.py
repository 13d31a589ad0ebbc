"""The protected share that keeps general ability: found by short tuning tries, measured on held-out general text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gatedadapters.errors import MaskError
from gatedadapters.masking.delta import apply_mask
from gatedadapters.masking.mask import Mask
from gatedadapters.masking.scores.base import Batch, Loss
from gatedadapters.masking.scores.losses import task_losses

FIRST, LEAST, MOST = 0.05, 1e-4, 0.5  # free shares: of the first try, and the limits of the search
CONFIDENT = 1.645  # standard errors that are added to a measured rise: the 95 % quantile of the normal distribution
CLOSE = 0.6  # of the target: a share that comes so close is good enough
AIM = 0.8  # of the target: what the next try aims at
STRETCH = 10.0  # most that the free share changes from one try to the next


@dataclass(frozen=True)
class TuningTrial:
    """How the tuning to come is tried out, to find the share of elements that it may move; see `select`.

    A try applies a mask, trains with AdamW at a rate that falls linearly, measures, and takes everything back. It
    should be like the training to come: the same rate and batches, and as many steps if that can be afforded. A shorter
    try stands for the whole training by assuming that the general loss rises in proportion to the steps.

    Attributes:
        model: the model that was scored.
        train: batches of the domain; each try begins with the first, and starts over when they end.
        held_out: batches of general text that the scores have not seen.
        steps: optimiser steps of the training to come.
        learning_rate: its highest rate.
        try_steps: most steps of a try.
        tries: most tries.
        loss: `(model, batch) -> (examples,)`, see `score`.
        heads: see `apply_mask`.
        progress: show a progress bar on a terminal.
    """

    model: nn.Module
    train: Iterable[Batch]
    held_out: Iterable[Batch]
    steps: int
    learning_rate: float
    try_steps: int = 100
    tries: int = 6
    loss: Loss = task_losses
    heads: tuple[str, ...] | None = None
    progress: bool = True


@dataclass(frozen=True)
class Tried:
    """What one try showed.

    Attributes:
        free: share of the elements that were free.
        rise: relative rise of the general loss over the whole training.
        bound: what the rise does not exceed with a confidence of 95 %, as far as the held-out text can tell.
    """

    free: float
    rise: float
    bound: float


def mask_that_keeps(target: float, trial: TuningTrial | None, choose: Callable[[float], Mask]) -> Mask:
    """The largest mask that was tried and raises the general loss by at most a share of it.

    The free share is searched on a logarithmic scale: a rise is taken to be proportional to the free share until both
    a share that is small enough and one that is too large are known; then the interval between these is divided.

    Args:
        target: the most that the general loss may rise, as a share of it.
        trial: how to try.
        choose: makes the mask of a free share.

    Raises:
        MaskError: there is no trial or no held-out general text, the target is not above 0, the tuned loss is not
            finite, or no share meets the target; the error then says what the best one was.
    """
    held_out = [] if trial is None else list(trial.held_out)
    if trial is None or not held_out:
        raise MaskError(
            "there is no held-out general text, so nobody can tell what is kept",
            expected="trial=TuningTrial(..., held_out=batches of general text that the scores have not seen)",
            got="no trial" if trial is None else "no batches",
            where="select(keep_general=)",
            fix="hold some general text out, or give protect= instead",
        )
    if not 0 < target < math.inf:
        raise MaskError(
            expected="keep_general above 0, such as 0.01 for one percent",
            got=target,
            where="select(keep_general=)",
            fix="give such a value",
        )
    before = _losses(trial, held_out)
    tried: list[Tried] = []
    kept: Mask | None = None
    steps = min(trial.steps, trial.try_steps)
    with tqdm(total=trial.tries * steps, unit="step", leave=False, disable=None if trial.progress else True) as bar:
        free: float | None = FIRST
        while free is not None and len(tried) < trial.tries:
            mask = choose(free)
            found = _tried(trial, mask, free, before, held_out, steps, bar)
            tried.append(found)
            bar.set_description(f"protect {1 - free:.2%}: general loss {found.rise:+.2%} (at most {found.bound:+.2%})")
            if found.bound <= target:
                kept = mask  # larger than one that was kept before, see `next_share`
            free = next_share(tried, target)
    if kept is None:
        best = min(tried, key=lambda found: found.bound)
        raise MaskError(
            f"no protected share keeps the general loss within {target:+.2%}",
            expected=f"a rise of at most {target:.2%}",
            got=f"at best {best.rise:+.2%} (at most {best.bound:+.2%}), at protect={1 - best.free:.4f}",
            where="select(keep_general=)",
            fix="lower the learning rate or the number of steps, hold more general text out, or raise the target",
        )
    kept.origin.update({"keep_general": target, "tries": [vars(found) for found in tried]})
    return kept


def next_share(tried: list[Tried], target: float) -> float | None:
    """The free share to try next; None where the search is over.

    Args:
        tried: the tries so far, the last one last.
        target: see `mask_that_keeps`.
    """
    kept = max((t.free for t in tried if t.bound <= target), default=None)
    lost = min((t.free for t in tried if t.bound > target), default=None)
    if kept is not None and max(t.bound for t in tried if t.free == kept) >= CLOSE * target:
        return None
    if kept is not None and lost is not None:
        return math.sqrt(kept * lost) if lost > 1.2 * kept else None
    last = tried[-1]
    factor = STRETCH if last.bound <= 0 else AIM * target / last.bound
    limit = MOST if kept is not None else LEAST
    if last.free == limit:
        return None
    stretched = last.free * min(STRETCH, max(1 / STRETCH, factor))
    return min(limit, stretched) if kept is not None else max(limit, stretched)


def _tried(
    trial: TuningTrial, mask: Mask, free: float, before: Tensor, held_out: list[Batch], steps: int, bar: Any
) -> Tried:
    """Tune with a mask for some steps, measure, and restore the model."""
    modes = [(module, module.training) for module in trial.model.modules()]
    delta = apply_mask(trial.model, mask, heads=trial.heads)
    heads = [(head, head.detach().clone()) for head in delta.head_parameters()]
    try:
        _train(trial, [*delta.parameters(), *(head for head, _ in heads)], steps, bar)
        change = (_losses(trial, held_out) - before) * (trial.steps / steps)
    finally:
        delta.remove()
        with torch.no_grad():
            for head, start in heads:
                head.copy_(start)
                head.grad = None
        for module, mode in modes:
            module.training = mode
    if not bool(change.isfinite().all()):
        raise MaskError(
            "the loss is not finite after a try",
            expected="a training that converges",
            got=f"{float(change.mean())}",
            where=f"select(keep_general=), protect={1 - free:.4f}",
            fix="lower the learning rate",
        )
    error = float(change.std() / math.sqrt(len(change))) if len(change) > 1 else 0.0
    rise, usual = float(change.mean()), float(before.mean())
    return Tried(free, rise / usual, (rise + CONFIDENT * error) / usual)


def _train(trial: TuningTrial, parameters: list[nn.Parameter], steps: int, bar: Any) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=trial.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    trial.model.train()
    for batch in itertools.islice(_endless(trial), steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            trial.loss(trial.model, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay.step()
        bar.update()


def _endless(trial: TuningTrial) -> Iterator[Batch]:
    found = False
    while True:
        for batch in trial.train:
            found = True
            yield _moved(batch, trial.model)
        if not found:
            raise MaskError(
                "there is nothing to tune on",
                expected="batches of the domain",
                got="none",
                where="TuningTrial(train=)",
                fix="pass a list or a DataLoader; a generator is used up after one pass",
            )
        found = False


@torch.no_grad()
def _losses(trial: TuningTrial, held_out: list[Batch]) -> Tensor:
    """The loss of every held-out example, (examples,) float64, in evaluation mode."""
    modes = [(module, module.training) for module in trial.model.modules()]
    trial.model.eval()
    try:
        parts = [trial.loss(trial.model, _moved(batch, trial.model)).double().cpu() for batch in held_out]
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.cat(parts)


def _moved(batch: Batch, model: nn.Module) -> dict[str, Any]:
    home = next(model.parameters()).device
    return {name: value.to(home) if isinstance(value, Tensor) else value for name, value in batch.items()}
