"""The arms: each makes part of the problem's model trainable and says by which loss it is trained."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import gatedadapters as ga
from benchmarks.common.models import block_maps
from benchmarks.common.store import SCRATCH
from benchmarks.studies.forgetting_frontier.cells import Cell
from benchmarks.studies.forgetting_frontier.problem import Batch, Batches, Problem
from benchmarks.studies.placement.precision import autocast
from gatedadapters.masking import Score
from gatedadapters.masking.scores.refreshed import Refreshed

REFRESH_STEPS = 10
SCORED = 8  # batches that importance is measured on, of each kind of text
RANK, LAST, EWC_WEIGHT = 8, 4, 1e4
REPLAYED = 5  # steps after which one of a batch's four blocks is English: 5 % of all blocks
SPACES = {
    "lora": [{"kind": "lora", "rank": RANK}],
    "norm": [{"kind": "norm"}],
    "ia3": [
        {"kind": "scale", "side": "output", "at": {"sublayers": ["attention"], "roles": ["k", "v"]}},
        {"kind": "scale", "side": "input", "at": {"sublayers": ["feed_forward"], "roles": ["down"]}},
    ],
}


@dataclass
class Arm:
    """How a model is trained.

    Attributes:
        parameters: what the optimiser moves; groups with rates of their own come as dictionaries.
        batches: what is learned from.
        loss: of the model and a batch.
        finish: called before the model is measured for the last time.
        at_once: whether the model can be measured only at the end of a run.
    """

    parameters: list[Any]
    batches: Iterator[Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    finish: Callable[[], object] = lambda: None
    at_once: bool = False

    @property
    def count(self) -> int:
        """How many values are trained."""
        groups = [group["params"] if isinstance(group, dict) else [group] for group in self.parameters]
        return sum(p.numel() for group in groups for p in group)


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss per token."""
    loss: Tensor = model(**batch).loss
    return loss


@contextmanager
def prepared(problem: Problem, cell: Cell) -> Iterator[Arm]:
    """The arm of a cell within the problem's model; everything is undone afterwards."""
    model, arm = problem.model, cell.arm
    with ExitStack() as undone:
        undone.callback(problem.freeze)
        found = Arm([], problem.domain(cell.seed), plain_loss)
        if arm in SPACES:
            found.parameters = list(_attached(model, SPACES[arm], cell.seed).weight_parameters())
            undone.callback(ga.detach, model)
        elif arm in ("gates", "joint"):
            undone.callback(_take_out, model)
            _search(problem, cell, found)
        elif arm == "osft":
            subspace = ga.apply_subspace(model, protect=cell.protect)
            found.parameters = list(subspace.parameters())
            undone.callback(subspace.remove)
        elif arm in ("full", "slow", "replay", "talr", "ewc", "last"):
            undone.callback(problem.restore)
            _whole(problem, cell, found)
        else:
            delta = ga.apply_mask(model, mask_of(problem, cell))
            found.parameters = list(delta.parameters())
            undone.callback(delta.remove)
        yield found


def _whole(problem: Problem, cell: Cell, found: Arm) -> None:
    """Arms that train whole tensors."""
    model = problem.model
    model.requires_grad_(True)
    if cell.arm == "last":
        ga.train_last_blocks(model, LAST)
    elif cell.arm == "replay":
        found.batches = _replayed(problem, cell.seed)
    elif cell.arm == "talr":
        adaptive = ga.TokenAdaptiveLoss()
        found.loss = lambda model, batch: adaptive(model(**_inputs(batch)), batch["labels"])
    elif cell.arm == "ewc":
        with autocast():
            fisher = ga.score(model, _taken(problem.general, cell.seed), kind="fisher")
        penalty = ga.ElasticPenalty(model, fisher, weight=EWC_WEIGHT)
        model.requires_grad_(True)
        found.loss = lambda model, batch: plain_loss(model, batch) + penalty()
    found.parameters = [p for p in model.parameters() if p.requires_grad]


def _inputs(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


def _replayed(problem: Problem, seed: int) -> Iterator[Batch]:
    """Batches of the domain, with one block of English in every fifth."""
    english = problem.general(seed)
    for step, batch in enumerate(problem.domain(seed)):
        if step % REPLAYED == REPLAYED - 1:
            other = next(english)
            batch = {name: torch.cat([value[:-1], other[name][:1]]) for name, value in batch.items()}
        yield batch


def _attached(model: nn.Module, paths: Any, seed: int) -> Any:
    """All candidates of a space, without gates."""
    space = ga.SearchSpace.parse({"name": "arm", "paths": paths}, where="forgetting_frontier")
    candidates = ga.attach(model, space)
    structure = candidates.discretize(scores=torch.ones_like(candidates.bank.kept, dtype=torch.float32))
    ga.detach(model)
    return ga.attach(model, structure, seed=seed)


def _search(problem: Problem, cell: Cell, found: Arm) -> None:
    """LoRA whose ranks are searched within the size of `lora`; `joint` gives half of that to a mask."""
    model = problem.model
    size = RANK * sum(sum(model.get_submodule(name).weight.shape) for name in block_maps(model))
    free: list[nn.Parameter] = []
    if cell.arm == "joint":
        maps = sum(model.get_submodule(name).weight.numel() for name in block_maps(model))
        mask = mask_of(problem, replace(cell, arm="fisher", protect=1 - size / 2 / maps))
        free = list(ga.apply_mask(model, mask).parameters())
    space = ga.SearchSpace.parse({"paths": [{"kind": "lora", "rank": 2 * RANK}]}, where="forgetting_frontier")
    adapters = ga.attach(model, space, seed=cell.seed)
    adapters.set_penalty(ga.Budget(params=size - sum(p.numel() for p in free)), total_steps=cell.steps)
    weights = [*adapters.weight_parameters(), *({"params": free, "lr": 1e-3},) * bool(free)]
    found.parameters = [*weights, {"params": adapters.gate_parameters(), "lr": 0.1}]
    found.loss = lambda model, batch: plain_loss(model, batch) + adapters.penalty()
    found.finish, found.at_once = adapters.compact, True


def _take_out(model: nn.Module) -> None:
    if hasattr(model, "gated_adapters"):
        ga.detach(model)
    if hasattr(model, "sparse_delta"):
        ga.get_delta(model).remove()


# -- masks -------------------------------------------------------------------------------------------------------------


def mask_of(problem: Problem, cell: Cell) -> ga.Mask:
    """The arm's mask over the linear maps, made once for all rates and kept in a file."""
    folder = SCRATCH / "forgetting_frontier" / f"{cell.domain}-{cell.arm}-{cell.protect:g}-{cell.seed}"
    if not folder.exists():
        _made(problem, cell).save(folder)
    return ga.Mask.load(folder)


def _made(problem: Problem, cell: Cell) -> ga.Mask:
    model, seed, arm = problem.model, cell.seed, cell.arm
    fixed = fixed_roles(model)
    if arm in ("random", "shira"):
        scope: Any = "tensor" if arm == "shira" else "global"
        return ga.select(ga.score(model, kind="random", exclude=fixed, seed=seed), protect=cell.protect, scope=scope)
    if arm == "refreshed":
        return _refreshed(problem, cell, fixed)
    kind = "taylor" if arm == "inverse" else arm
    general = _scores(problem, problem.general, kind, seed, fixed)
    if arm == "inverse":  # what matters most in general is free
        turned = {name: general[name].max() - general[name] for name in general.names}
        return ga.select(ga.Scores(general.record, turned), protect=cell.protect)
    return ga.select(general, _scores(problem, problem.domain, kind, seed, fixed), protect=cell.protect)


def _refreshed(problem: Problem, cell: Cell, fixed: list[str]) -> ga.Mask:
    """The Fisher mask, chosen again by the Fisher information in general after a few steps with the first one."""
    model, seed = problem.model, cell.seed
    in_domain = _scores(problem, problem.domain, "fisher", seed, fixed)
    first = ga.select(_scores(problem, problem.general, "fisher", seed, fixed), in_domain, protect=cell.protect)
    delta = ga.apply_mask(model, first)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=1e-3, weight_decay=0.0)
    for batch in itertools.islice(problem.domain(seed), REFRESH_STEPS):
        optimizer.zero_grad()
        with autocast():
            loss = plain_loss(model, batch)
        loss.backward()
        optimizer.step()
    delta.remove()
    return ga.select(_scores(problem, problem.general, Refreshed(delta), seed, fixed), in_domain, protect=cell.protect)


def _scores(problem: Problem, batches: Batches, kind: str | Score, seed: int, fixed: list[str]) -> ga.Scores:
    with autocast():
        return ga.score(problem.model, _taken(batches, seed), kind=kind, exclude=fixed, seed=seed)


def _taken(batches: Batches, seed: int) -> list[Batch]:
    """Batches to score by, drawn apart from those that are learned from."""
    return list(itertools.islice(batches(1000 + seed), SCORED))


def fixed_roles(model: nn.Module) -> list[str]:
    """Roles that no mask selects from: all but the linear maps of the blocks."""
    roles = set(ga.score(model, kind="magnitude").roles.values())
    return [role for role in ("embedding", "norm", "bias", "head") if role in roles]
