"""Where gates start from: a probe on batches of the training, judged by a placement score."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

from gatedadapters.allocation import Placement, PlacementScore
from gatedadapters.allocation.allocate import FRONTIER_POINTS, place_attached
from gatedadapters.config import Budget
from gatedadapters.supernet.adapters import Adapters

FEWEST_STEPS = 32
FEWEST_BATCHES, MOST_BATCHES = 8, 24  # a budget relative to the gain needs a probe before a shorter training, too
NOTED = frozenset({"_metrics", "_total_train_tokens"})
"""What TRL's trainers count whenever they compute a loss."""


def probe_batches(steps: int) -> int:
    """Batches of the probe before a training of `steps`: half as many, at most 24; with 8 a score knows little.

    0 below 32 steps: so short a training starts from even gates, because a probe would cost more than it can win.
    """
    return 0 if steps < FEWEST_STEPS else min(MOST_BATCHES, steps // 2)


def can_be_probed(trainer: Trainer) -> bool:
    """Whether a Trainer's batches are its data: one that generates its examples from the model has no others."""
    return type(trainer)._prepare_inputs is Trainer._prepare_inputs


def start_gates(
    trainer: Trainer,
    adapters: Adapters,
    loss_of: Callable[[nn.Module, dict[str, Any]], Tensor],
    *,
    steps: int,
    score: PlacementScore,
    budget: Budget | None,
) -> Placement:
    """Let gates start from what a score says of the candidates, after a probe on the first batches of the training.

    Candidates and heads start from what they learnt in the probe, so that gates judge units that have learnt something.
    The backbone, the random state and the trainer's metrics are as before. All processes start from the mean of what
    they found and learnt.

    Args:
        trainer: gives the batches and their preparation.
        adapters: the candidates, in the trainer's model.
        loss_of: the task's loss of a prepared batch, a scalar.
        steps: length of the training.
        score: see `allocate`.
        budget: the frontier is measured if it is relative to the held-out gain.

    Raises:
        AllocationError: see `allocate`.
    """
    model = trainer.model
    assert isinstance(model, nn.Module)
    if trainer.args.gradient_checkpointing:  # as the Trainer does when it begins
        options = trainer.args.gradient_checkpointing_kwargs
        cast(PreTrainedModel, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    pressure = adapters.pressure
    noted = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if name in NOTED}

    def losses(model: nn.Module, batch: Any) -> Tensor:
        # The Trainer wraps the model in the accelerator's autocast only when the training begins.
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            return loss_of(model, trainer._prepare_inputs(dict(batch))).float().view(1)

    relative = budget is not None and budget.within is not None
    with torch.random.fork_rng():
        batches = list(itertools.islice(trainer.get_train_dataloader(), probe_batches(steps) or FEWEST_BATCHES))
        placement = place_attached(
            model,
            adapters,
            batches,
            score=score,
            learning_rate=trainer.args.learning_rate,
            loss=losses,
            seed=adapters.seed,
            progress=not trainer.args.disable_tqdm,
            budget=None if relative or pressure is None else cast(Budget, pressure.penalty),
            frontier=FRONTIER_POINTS if relative else 0,
            within=budget.within if budget is not None else None,
        )
    vars(trainer).update(noted)
    bank = placement.bank
    # A probe that helps nowhere says nothing, and equal worths leave the gates even.
    worth = placement.for_their_cost().to(bank.log_alpha).clamp(min=0.0)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(worth)
        for parameter in (*adapters.weight_parameters(), *adapters.head_parameters()):
            _take_mean(parameter)
    bank.start_from(worth)
    return placement


@torch.no_grad()
def _take_mean(parameter: nn.Parameter) -> None:
    """Give all processes the mean of their values; shards hold it already, because their gradients are shared."""
    if not isinstance(parameter, DTensor):
        dist.all_reduce(parameter)
        parameter.div_(dist.get_world_size())


def agreed_size(placement: Placement, budget: Budget) -> int:
    """Parameters of the structure of a relative budget; the largest that any process found on its own batches."""
    size = torch.tensor(placement.structure(budget).params, device=placement.bank.log_alpha.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(size, op=dist.ReduceOp.MAX)
    return int(size)
