"""The arms: each tunes a problem's model in its own way, on equally many values where it chooses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

import gatedadapters as ga
from benchmarks.common import peft_rivals
from benchmarks.common.models import block_maps, lora_space
from benchmarks.studies.forgetting.cells import Cell
from benchmarks.studies.forgetting.problems import Batch, Problem, fit


def tuned(problem: Problem, cell: Cell) -> tuple[nn.Module, int]:
    """Tune the problem's model as the arm does; the model and how many values were tuned."""
    model, arm = problem.model, cell.arm
    penalty = None
    if arm == "zero":
        return model, 0
    if arm in ("lora", "shira", "supertuning"):
        model = with_peft(problem, cell)
    elif arm in ("gated", "joint"):
        return searched(problem, cell)
    elif arm == "last":
        ga.train_last_blocks(model, 1, heads=problem.heads)
    elif arm == "ewc":
        fisher = ga.score(model, taken(problem.general, 16), kind="fisher", heads=problem.heads)
        penalty = ga.ElasticPenalty(model, fisher, weight=1e4)
    elif arm != "full":
        ga.apply_mask(model, mask_of(problem, cell), heads=problem.heads)
    trained = [p for p in model.parameters() if p.requires_grad]
    fit(model, trained, problem.domain(cell.seed), cell.rate, cell.steps, penalty)
    return model, sum(p.numel() for p in trained)


def taken(batches: Callable[[int], Iterator[Batch]], count: int) -> list[Batch]:
    """Some batches to score by."""
    source = batches(1234)
    return [next(source) for _ in range(count)]


def mask_of(problem: Problem, cell: Cell) -> ga.Mask:
    """The arm's mask over the linear maps; all arms tune equally many elements."""
    general = taken(problem.general, 16)
    roles = ga.score(problem.model, kind="magnitude", heads=problem.heads).roles
    fixed = [role for role in ("embedding", "norm", "bias", "head") if role in roles.values()]
    fixed += ["heads.*"] if any(name.startswith("heads.") for name in roles) else []  # of what was learnt before
    options: dict[str, Any] = {"heads": problem.heads, "exclude": fixed, "seed": cell.seed}
    if cell.arm == "random":
        return ga.select(ga.score(problem.model, kind="random", **options), protect=cell.protect)
    kind = "fisher" if cell.arm == "fisher" else "taylor"
    importance = ga.score(problem.model, general, kind=kind, **options)
    if cell.arm == "inverse":  # what matters most is free
        turned = {name: importance[name].max() - importance[name] for name in importance.names}
        return ga.select(ga.Scores(importance.record, turned), protect=cell.protect)
    domain = None
    if cell.arm == "contrast":
        domain = ga.score(problem.model, taken(problem.domain, 16), kind=kind, **options)
    return ga.select(importance, domain, protect=cell.protect)


def with_peft(problem: Problem, cell: Cell) -> nn.Module:
    """LoRA, SHiRA or Super-Tuning of peft at every linear map of the blocks, as large as the masks."""
    model, rank = problem.model, rank_of(problem.model, cell)
    if cell.arm == "lora":
        wrapped = peft_rivals.lora(model, rank, alpha=2 * rank)
    elif cell.arm == "shira":
        wrapped = peft_rivals.shira(model, rank, seed=cell.seed)
    else:
        wrapped = peft_rivals.supertuning(model, cell.protect)
    for name in problem.heads:
        model.get_parameter(name).requires_grad_(True)
    return wrapped


def rank_of(model: nn.Module, cell: Cell) -> int:
    """Rank of LoRA at all maps with as many parameters as a mask has free elements."""
    return peft_rivals.rank_of_share(model, block_maps(model), 1 - cell.protect)


def searched(problem: Problem, cell: Cell) -> tuple[nn.Module, int]:
    """A searched structure as large as the masks, or one of half the size beside a mask of half the density."""
    model = problem.model
    whole = round((1 - cell.protect) * sum(model.get_submodule(name).weight.numel() for name in block_maps(model)))
    mask = (
        mask_of(problem, replace(cell, arm="contrast", protect=(1 + cell.protect) / 2)) if cell.arm == "joint" else None
    )
    inner = getattr(model, "backbone", model)  # one structure, whatever task an example is of
    adapters = ga.attach(inner, lora_space(4 * rank_of(model, cell)))
    free = [model.get_parameter(name).requires_grad_(True) for name in problem.heads]
    if mask is not None:
        delta = ga.apply_mask(model, mask, heads=problem.heads)
        free, whole = [*free, *delta.parameters()], whole - delta.params
    adapters.set_penalty(ga.Budget(params=whole), total_steps=cell.steps)
    gates = {"params": adapters.gate_parameters(), "lr": 0.1}
    trained = [*adapters.weight_parameters(), *free]
    fit(model, trained, problem.domain(cell.seed), cell.rate, cell.steps, adapters.penalty, [gates])
    return model, adapters.compact().params + sum(p.numel() for p in free)
