"""Scores from gradients at the start, before anything has been learned."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatedadapters.allocation.base import PlacementScore
from gatedadapters.allocation.probe import Probe
from gatedadapters.paths import Path


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the gradients said of one path.

    Attributes:
        total: what `GradientScore.add` summed over the batches: of the weight that the path adds to, (out, in) or
            (experts, out, in); else of its own parameters, as one vector.
        squared: sum over batches of the squared norm of the gradient.
        weight: the values that the gradient would change, of total's shape: the weight, or 1 for the factors and shifts
            of paths that add to a value.
        batches: number of batches.
        ranks: number of units of the candidate, of each expert if there are several.
        seed: of approximations.
    """

    total: Tensor
    squared: float
    weight: Tensor
    batches: int
    ranks: int
    seed: int

    @property
    def mean(self) -> Tensor:
        """The mean over the batches."""
        return self.total / self.batches

    def average(self, values: Tensor) -> Tensor:
        """The mean of `values`, of total's shape, over the tensor: (1,), or of each expert, (experts,)."""
        return values.flatten(1).mean(1) if values.dim() == 3 else values.mean()[None]

    def gains(self) -> Tensor:
        """What each unit, of unit norm, gains to first order: leading singular values, or the norm of a vector.

        Returns:
            (experts * ranks,) for a weight, in the order of the candidate's units; (1,) for a vector.
        """
        mean = self.mean
        return mean.norm()[None] if mean.dim() == 1 else leading_singular_values(mean, self.ranks, self.seed)


class GradientScore(PlacementScore):
    """A score from one pass of gradients over the batches, at the start.

    A path that adds a low-rank map to a weight is judged by the gradient of the whole weight: a new path's own gradient
    knows only the few random directions that its ranks start in. Other paths are judged by their own gradients. Memory
    beside the model: one tensor of the size of each that is judged.
    """

    def worth(self, probe: Probe) -> dict[str, Tensor]:
        """See `PlacementScore.worth`; `add` sees each gradient, `units` turns the sums into worths."""
        told_by = {key: _told_by(probe, key, path) for key, path in probe.paths.items()}
        parameters = {name: p for tensors in told_by.values() for name, p in tensors.items()}
        totals = {name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for name, p in parameters.items()}
        squared: Counter[str] = Counter()

        def use(name: str, grad: Tensor) -> None:
            grad = grad.float()
            squared[name] += float(grad.square().sum())  # type: ignore[assignment]
            self.add(totals[name], grad)

        batches = probe.gradients(parameters, use)
        found = {}
        for key, path in probe.paths.items():
            names = list(told_by[key])
            at_weight = path.weight_added_to is not None and names[0] == path.weight_added_to
            total = totals[names[0]] if at_weight else torch.cat([totals[name].flatten() for name in names])
            weight = parameters[names[0]].detach().float() if at_weight else torch.ones_like(total)
            seen = sum(squared[name] for name in names)
            evidence = Evidence(total, seen, weight, batches, probe.ranks[key], probe.seed)
            found[key] = self.units(evidence, probe.unit_params[key]).float().cpu()
        return found

    def add(self, total: Tensor, grad: Tensor) -> None:
        """Add a batch's gradient, float32, to the total, in place."""
        total += grad

    @abstractmethod
    def units(self, evidence: Evidence, params: float) -> Tensor:
        """The worths of what a path may add.

        Args:
            evidence: of the path.
            params: parameters of one unit. A score that is a density must be multiplied by it, because worths are
                divided by costs to fill a budget.

        Returns:
            See `PlacementScore.worth`.
        """


def _told_by(probe: Probe, key: str, path: Path) -> dict[str, nn.Parameter]:
    """The tensors whose gradients tell what a path could gain: the weight it adds to, or its own."""
    weight = probe.weight_of(path)
    if path.weight_added_to is not None and weight is not None:
        return {path.weight_added_to: weight}
    return {f"{key}.{name}": parameter for name, parameter in path.named_parameters() if parameter.requires_grad}


def leading_singular_values(matrix: Tensor, count: int, seed: int) -> Tensor:
    """The largest singular values of a matrix, or of each matrix of a stack, (matrices * count,), padded with zeros.

    References:
        Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithm 4.4: subspace iteration from a random start.
    """
    stack = matrix if matrix.dim() == 3 else matrix[None]
    width = min(count + 6, *stack.shape[-2:])
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(stack.shape[-1], width, generator=generator).to(stack)
    basis = torch.linalg.qr(stack @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(stack @ torch.linalg.qr(stack.mT @ basis).Q).Q
    found = torch.linalg.svdvals(basis.mT @ stack)[:, :count]
    return torch.nn.functional.pad(found, (0, count - found.shape[1])).flatten()
