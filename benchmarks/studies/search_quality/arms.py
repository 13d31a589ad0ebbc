"""The arms: each attaches its adapters to a classifier and returns the options of its trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import gatedadapters as ga
from benchmarks.common import peft_rivals
from benchmarks.common.training import attach_best, dense_cost
from benchmarks.studies.search_quality.cells import Cell

SCHEDULE = ga.Schedule(warmup=0.02, ramp=0.08, prune=0.1)
LINEAR = "lora-all-linear"
Batches = Sequence[Mapping[str, Tensor]]


def searched(model: nn.Module, cell: Cell, batches: Batches) -> dict[str, Any]:
    """One gated run: warm-up, ramp, prune, fine-tune the survivors."""
    ga.attach(model, LINEAR, seed=cell.seed)
    return {"budget": ga.Budget(fraction=cell.budget), "schedule": SCHEDULE}


def searched_mixed(model: nn.Module, cell: Cell, batches: Batches) -> dict[str, Any]:
    """The same search over every path kind, to the same number of parameters."""
    size = _size(model, cell)
    ga.attach(model, _mixed(), seed=cell.seed)
    return {"budget": ga.Budget(params=size), "schedule": SCHEDULE}


def random_structure(model: nn.Module, cell: Cell, batches: Batches) -> dict[str, Any]:
    """A random structure of the same size, trained from the first step."""
    return _given(model, cell, LINEAR, _random(cell))


def random_mixed(model: nn.Module, cell: Cell, batches: Batches) -> dict[str, Any]:
    """A random structure of every path kind, of the same size."""
    return _given(model, cell, _mixed(), _random(cell))


def uniform(model: nn.Module, cell: Cell, batches: Batches) -> dict[str, Any]:
    """The same rank everywhere, or rank 1 at evenly spaced maps where the budget is below rank 1."""
    return _given(model, cell, LINEAR, _evenly)


def attention_only(model: nn.Module, cell: Cell, batches: Batches) -> dict[str, Any]:
    """LoRA at the attention maps only, ranks as even as the budget allows."""
    return _given(model, cell, "attention-only", _evenly)


def svd(model: nn.Module, cell: Cell, batches: Batches) -> dict[str, Any]:
    """Dense training for 65 % of the steps, cut to the budget by singular values, then fine-tuned."""
    return _all_open(model, cell, TruncateBySVD(ga.Budget(fraction=cell.budget), at=0.65))


def dense(model: nn.Module, cell: Cell, batches: Batches) -> dict[str, Any]:
    """All candidates, nothing pruned: what the others are compressed from."""
    return _all_open(model, cell, TruncateBySVD(ga.Budget(fraction=1.0), at=2.0))


def adalora(model: nn.Module, cell: Cell, batches: Batches) -> dict[str, Any]:
    """AdaLoRA of peft."""
    return {"callbacks": [peft_rivals.adalora(model, cell.steps)]}


def eva(model: nn.Module, cell: Cell, batches: Batches) -> dict[str, Any]:
    """LoRA of peft with EVA's ranks."""
    peft_rivals.eva(model, batches)
    return {}


BY_NAME: dict[str, Callable[[nn.Module, Cell, Batches], dict[str, Any]]] = {
    "searched": searched,
    "dense": dense,
    "random": random_structure,
    "uniform": uniform,
    "attention": attention_only,
    "svd": svd,
    "searched-mixed": searched_mixed,
    "random-mixed": random_mixed,
    "adalora": adalora,
    "eva": eva,
}


class TruncateBySVD(TrainerCallback):
    """Rotates every path's ranks into singular directions and keeps the largest singular values that fit.

    Until then paths learn at the share of the rate that the budget is of them, as the search does: the rate is that of
    what is kept, so that one rate can be tuned for both parts.

    Args:
        budget: for what is kept.
        at: share of the steps after which ranks are cut; never, if it is above 1.
    """

    def __init__(self, budget: ga.Budget, at: float) -> None:
        self.budget, self.at = budget, at

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, lr_scheduler: Any, **kwargs: Any
    ) -> None:
        """Lower the rate of the dense part."""
        paths, until = {id(p) for p in ga.get_adapters(model).weight_parameters()}, self.at * state.max_steps

        def lowered(factor: Callable[[int], float]) -> Callable[[int], float]:
            return lambda step: factor(step) * (self.budget.fraction if step < until else 1.0)

        for index, group in enumerate(optimizer.param_groups):
            if id(group["params"][0]) in paths:
                lr_scheduler.lr_lambdas[index] = lowered(lr_scheduler.lr_lambdas[index])

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        """At `at` of the steps, once."""
        adapters = ga.get_adapters(model)
        if adapters.bank.frozen or state.global_step < self.at * state.max_steps:
            return
        scores = torch.zeros_like(adapters.bank.kept)
        inner = getattr(optimizer, "optimizer", optimizer)
        for key, path in adapters.paths.items():
            u, s, v = torch.linalg.svd(path.up @ path.down, full_matrices=False)
            r = path.units
            path.up.copy_(u[:, :r] * s[:r].sqrt())
            path.down.copy_(s[:r].sqrt()[:, None] * v[:r])
            scores[:, adapters.bank.slices[key]] = s[:r]
            for parameter in (path.up, path.down):
                inner.state.pop(parameter, None)  # its moments belong to the unrotated ranks
        adapters.prune(adapters.discretize(self.budget, scores=scores))


def _all_open(model: nn.Module, cell: Cell, truncate: TruncateBySVD) -> dict[str, Any]:
    """Attach all candidates with gates that stay open."""
    space = ga.SearchSpace.load(LINEAR).with_gates(stochastic=False, init_spread=0.0)
    ga.attach(model, space, seed=cell.seed)
    return {"gate_learning_rate": 1e-30, "callbacks": [truncate]}


def _given(
    model: nn.Module, cell: Cell, space: str | ga.SearchSpace, scores: Callable[[Any], Tensor]
) -> dict[str, Any]:
    """Attach the structure of the cell's size that takes the candidates with the highest scores."""
    attach_best(model, space, _size(model, cell), scores, seed=cell.seed)
    return {}


def _size(model: nn.Module, cell: Cell) -> int:
    """Parameters of every arm: a share of LoRA rank 8 at every linear map."""
    return int(dense_cost(model, LINEAR) * cell.budget)


def _mixed() -> ga.SearchSpace:
    return ga.SearchSpace.load("encoder-mixed").with_gates(levels=("rank",))


def _evenly(bank: Any) -> Tensor:
    """Scores that fill rank by rank, and within a rank spread over the maps."""
    order = {key: i for i, key in enumerate(bank.slices)}
    scores = torch.zeros_like(bank.kept)
    for key, where in bank.slices.items():
        spread = (order[key] * 0.6180339887) % 1.0  # a low-discrepancy order, so that any prefix is spread evenly
        scores[:, where] = 2.0 - torch.arange(where.stop - where.start) - 0.5 * spread
    return scores - scores.min() + 1


def _random(cell: Cell) -> Callable[[Any], Tensor]:
    """Scores by chance, of the cell's seed."""
    generator = torch.Generator().manual_seed(7919 * cell.seed + 17)
    return lambda bank: torch.rand(bank.kept.shape, generator=generator)
