"""Is a target for general ability met on text that neither scores nor tries have seen?"""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import gatedadapters as ga
from benchmarks.common.store import Result
from benchmarks.studies.forgetting_frontier.arms import SCORED, fixed_roles, plain_loss
from benchmarks.studies.forgetting_frontier.cells import KeepCell
from benchmarks.studies.forgetting_frontier.problem import Batch, Problem, problem_of
from benchmarks.studies.placement.precision import autocast, precision
from gatedadapters.errors import MaskError
from gatedadapters.masking.scores.losses import task_losses
from gatedadapters.reporting.versions import versions

SEEN = 16  # batches of general text that the tries are measured on


def compute_keep(cell: KeepCell) -> Result:
    """Choose a share by tries, tune with it, and measure on the study's held-out text."""
    torch.manual_seed(cell.seed)
    problem = problem_of(cell.domain)
    model, fixed = problem.model, fixed_roles(problem.model)
    began = time.process_time()
    general = problem.general(1000 + cell.seed)
    scored, seen = (list(itertools.islice(general, count)) for count in (SCORED, SEEN))
    learned = list(itertools.islice(problem.domain(cell.seed), cell.steps))
    in_domain = list(itertools.islice(problem.domain(1000 + cell.seed), SCORED))
    with autocast():
        scores = [ga.score(model, batches, kind="fisher", exclude=fixed) for batches in (scored, in_domain)]
    trial = ga.TuningTrial(model, learned, seen, steps=cell.steps, learning_rate=cell.rate, loss=_losses)
    try:
        mask = ga.select(*scores, keep_general=cell.target, trial=trial)
    except MaskError as error:
        return {"keep": asdict(cell), "refused": str(error), "versions": versions()}
    chosen = time.process_time() - began
    before = problem.measured()
    delta = ga.apply_mask(model, mask)
    try:
        _tune(problem, list(delta.parameters()), learned, cell)
        after = problem.measured()
    finally:
        delta.remove()
    in_general = [sum(losses[kind] for kind in ("news", "fiction")) / 2 for losses in (before, after)]
    return {
        "keep": asdict(cell),
        "protect": 1 - mask.origin["free"],
        "tries": mask.origin["tries"],
        "rise": in_general[1] / in_general[0] - 1,
        "learned": before["domain"] - after["domain"],
        "seconds": {"choose cpu": round(chosen, 1), "cpu": round(time.process_time() - began, 1)},
        "precision": precision(),
        "versions": versions(),
    }


def _losses(model: nn.Module, batch: Any) -> Tensor:
    with autocast():
        return task_losses(model, batch)


def _tune(problem: Problem, parameters: list[nn.Parameter], learned: list[Batch], cell: KeepCell) -> None:
    """The training that the tries stand for."""
    optimizer = torch.optim.AdamW(parameters, lr=cell.rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / cell.steps)
    problem.model.train()
    for batch in learned:
        optimizer.zero_grad()
        with autocast():
            loss = plain_loss(problem.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay.step()
