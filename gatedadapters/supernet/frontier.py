"""Measuring a frontier on candidates in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gatedadapters.config import Budget
from gatedadapters.errors import BudgetError
from gatedadapters.gates import GateBank
from gatedadapters.structure import Structure
from gatedadapters.structure.discretize import kept_mask
from gatedadapters.structure.frontier import Frontier, FrontierPoint
from gatedadapters.supernet.supernet import Supernet

SMALLEST_SHARE = 1 / 128
REFINEMENTS = 6


def measure(
    supernet: Supernet,
    bank: GateBank,
    discretize: Callable[[Budget], Structure],
    loss: Callable[[], float],
    *,
    points: int,
    within: float | None = None,
) -> Frontier:
    """The frontier of candidates that are attached to a model.

    Args:
        supernet: the candidates.
        bank: their gates.
        discretize: the structure of a budget.
        loss: the held-out loss of the model as its gates are now.
        points: number of budgets, in equal ratios from a 128th of all candidates to all of them.
        within: look more closely around the smallest budget that keeps `1 - within` of the gain.

    Raises:
        BudgetError: fewer than two points.
    """
    if points < 2:
        raise BudgetError(
            "a frontier has two ends", expected="at least 2 points", got=points, where="frontier", fix="ask for 8"
        )
    dense = bank.dense_cost()

    def at(size: float) -> FrontierPoint:
        structure = discretize(Budget(params=max(1, round(size))))
        with bank.held(kept_mask(structure, bank, supernet.typed_paths(), supernet.tasks)):
            return FrontierPoint(structure, loss())

    smallest = max(SMALLEST_SHARE * dense, float(bank.cost("params").min()))
    ratio = (dense / smallest) ** (1 / (points - 1))
    found = {}
    for number in range(points):
        point = at(smallest * ratio**number)
        found[point.params] = point
    with bank.held(torch.zeros_like(bank.kept)):
        base = loss()
    frontier = Frontier(tuple(found[size] for size in sorted(found)), base)
    for _ in range(REFINEMENTS if within is not None else 0):
        assert within is not None
        above = frontier.within(within).params
        below = max((p.params for p in frontier.points if p.params < above), default=0)
        if above <= 1.1 * below:
            break
        point = at((max(below, smallest) * above) ** 0.5)
        if point.params in found:
            break
        found[point.params] = point
        frontier = Frontier(tuple(found[size] for size in sorted(found)), base)
    return frontier


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """The mean over batches of the model's own loss, in evaluation mode.

    Raises:
        BudgetError: there are no batches.
    """
    was_training, home = model.training, next(model.parameters()).device
    model.eval()
    try:
        moved = ({k: v.to(home) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches)
        losses = [float(model(**batch).loss) for batch in moved]
    finally:
        model.train(was_training)
    if not losses:
        raise BudgetError(
            "there is nothing to measure the held-out loss on",
            expected="at least one batch",
            got="none",
            where="frontier(batches=)",
            fix="pass a DataLoader or a list of batches; a generator is used up after one pass",
        )
    return sum(losses) / len(losses)
