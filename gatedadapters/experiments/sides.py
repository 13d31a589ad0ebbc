"""Training one side of a study: a searched structure, uniform LoRA of the budget's size, or the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from gatedadapters.config.study import StudySide
from gatedadapters.errors import BudgetError
from gatedadapters.experiments.arms import ArmRunner
from gatedadapters.structure import Structure
from gatedadapters.supernet.attach import detach


@dataclass(frozen=True)
class TrainedSide:
    """The result of training one side.

    Attributes:
        params: number of parameters to store: those of the adapters or of the whole backbone, without heads.
        structure: the structure of the adapters; None if the whole model was trained.
        seconds: duration of training.
    """

    params: int
    structure: Structure | None
    seconds: float


@contextmanager
def trained_side(runner: ArmRunner, side: StudySide, progress: tqdm[Any]) -> Iterator[TrainedSide]:
    """A context in which the runner's model is trained, pruned and compact. Afterwards the model is as it was.

    Args:
        runner: the runner of the model, its tasks and their data.
        side: `gated` searches under the budget or the penalty; `uniform` trains LoRA of the budget's size, with the
            same ranks everywhere; `full` trains every weight of the model.
        progress: a bar, which moves by one a step.

    Raises:
        BudgetError: the side is `uniform`, and the search has no budget in parameters.
    """
    if side == "full":
        with _fully_trained(runner, progress) as trained:
            yield trained
        return
    searching = side == "gated"
    space = runner.config.resolved_space() if searching else runner.uniform_structure(_budget_size(runner))
    adapters = runner.attach(space)
    try:
        seconds = runner.train(adapters, side, progress, searching=searching)
        runner.compact(adapters)
        structure = cast(Structure, adapters.structure)
        yield TrainedSide(structure.params, structure, seconds)
    finally:
        detach(runner.model)


@contextmanager
def _fully_trained(runner: ArmRunner, progress: tqdm[Any]) -> Iterator[TrainedSide]:
    model = runner.model
    with torch.no_grad():
        for name, value in runner.first_heads.items():
            model.get_parameter(name).copy_(value)
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        model.requires_grad_(True)
        seconds = runner.train(None, "full", progress, searching=False)
        backbone = getattr(model, getattr(model, "base_model_prefix", ""), model)
        yield TrainedSide(sum(p.numel() for p in backbone.parameters()), None, seconds)
    finally:
        model.load_state_dict(before)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])
            parameter.grad = None


def _budget_size(runner: ArmRunner) -> int:
    """The budget in parameters, resolved against the configured space."""
    limit = runner.config.limit
    if limit is None or limit.unit != "params" or limit.within is not None:
        raise BudgetError(
            "uniform LoRA has the size of the budget",
            expected="a budget in parameters",
            got="a penalty" if limit is None else repr(limit),
            where="uniform",
            fix="give params or fraction, or leave uniform LoRA out",
        )
    adapters = runner.attach(runner.config.resolved_space())
    try:
        assert adapters.bank is not None
        return int(limit.resolve(adapters.bank.dense_cost()))
    finally:
        detach(runner.model)
