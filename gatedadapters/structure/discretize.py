"""Turns gates into a Structure by one deterministic rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from gatedadapters.backbone.fingerprint import Fingerprint
from gatedadapters.config import Budget, SearchSpace
from gatedadapters.errors import AttachError, BudgetError
from gatedadapters.gates import GateBank, check_budget
from gatedadapters.paths import Path
from gatedadapters.reporting.versions import versions
from gatedadapters.structure.structure import KeptPath, Offer, SiteRecord, Structure


@torch.no_grad()
def choose_units(bank: GateBank, budget: Budget | None, scores: Tensor | None = None) -> Tensor:
    """Choose the units that each task keeps.

    Without a budget, a task keeps the units whose test-time gate is above 0, or whose score is.

    With a budget, units are taken greedily in the order of their scores. A unit that no longer fits is skipped, so the
    result never exceeds the budget. A unit that another task has already taken costs nothing more. A task whose own
    gate is closed does not take a unit that is open for, or taken by, another task: the unit has learned for the other
    task, and a gate that is closed now would stay at 0.

    By default the score is P(open) (`GateBank.preference`), divided by k for a path's k-th likeliest unit, because a
    path's later units add less (see `GateBank.rank_price`). Tasks take turns: each task's best unit comes before any
    task's second. Once a Structure is fixed, only the units it kept are taken.

    Args:
        bank: the gates.
        budget: limit on the cost of the units kept by any task, and of those kept by each task.
        scores: (tasks, units); default: see above.

    Returns:
        (tasks, units) of 0 and 1.

    Raises:
        BudgetError: the budget does not pay for the cheapest unit, or the scores have another shape or hold NaN.
        AttachError: a gate is NaN.

    References:
        Hu et al. 2022 (S3Delta), arXiv 2206.07382: the greedy choice by probability under a budget.
    """
    gates = bank.deterministic()
    _check_gates(bank, gates)
    if budget is None and scores is None:
        return (gates > 0).float()
    if scores is not None and scores.shape != gates.shape:
        raise BudgetError(
            "the scores do not match the candidates",
            expected=f"shape {tuple(gates.shape)}, tasks by units",
            got=f"shape {tuple(scores.shape)}",
            where="discretize(scores=)",
            fix="score the units in the order of the gate bank",
        )
    if scores is not None and bool(scores.isnan().any()):
        raise BudgetError(
            "some scores are not numbers",
            expected="a number for each unit and task",
            got=f"nan for {int(scores.isnan().sum())} of {scores.numel()}",
            where="discretize(scores=)",
            fix="look for a division by zero or an overflow where they are computed",
        )
    values = bank.preference() if scores is None else scores.to(gates)
    if budget is None:
        return (values > 0).float()
    cost = bank.cost(budget.unit).tolist()
    left = check_budget(bank, budget)
    cap = budget.resolve_task(bank.dense_cost(budget.unit))
    task_left = [float("inf") if cap is None else cap] * bank.tasks
    kept = torch.zeros_like(gates)
    paid = [False] * bank.n_units
    is_open, of_others = (gates > 0).tolist(), (gates > 0).any(0).tolist()
    if scores is None:  # without turns a task with steeper gradients would take the whole budget
        values = values / bank.rank_within_path(values)
        best = values.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
        values = values - best.to(values)  # P is in [0, 1], so it decides only among equal ranks
    for flat in torch.argsort(values.flatten(), descending=True, stable=True).tolist():
        task, unit = divmod(flat, bank.n_units)
        if not is_open[task][unit] and (bank.frozen or of_others[unit] or paid[unit]):
            continue
        price = 0.0 if paid[unit] else cost[unit]
        if price > left or cost[unit] > task_left[task]:
            continue
        kept[task, unit] = 1.0
        left, paid[unit] = left - price, True
        task_left[task] -= cost[unit]
    return kept


def _check_gates(bank: GateBank, gates: Tensor) -> None:
    broken = (gates.isnan() | bank.open_probability().isnan()).any(0).nonzero().flatten().tolist()
    if broken:
        keys = [key for key, where in bank.slices.items() if any(where.start <= unit < where.stop for unit in broken)]
        raise AttachError(
            "some gates are not numbers",
            expected="a number for each gate",
            got=f"nan for {len(broken)} of {bank.n_units} units",
            where=", ".join([*keys[:3], *(["..."] if len(keys) > 3 else [])]),
            fix="the training diverged: train again with a lower rate, or from an earlier checkpoint",
        )


def kept_mask(structure: Structure, bank: GateBank, paths: Iterable[tuple[str, Path]], tasks: Sequence[str]) -> Tensor:
    """The inverse of `build_structure`: (tasks, units), 1 for each unit that the structure keeps.

    Raises:
        AttachError: the structure names other candidates than `paths`, or other tasks.
    """
    foreign = [task for task in structure.tasks if task not in tasks]
    if foreign:
        raise AttachError(
            "this structure was made for other tasks",
            expected=f"tasks among {', '.join(tasks)}",
            got=", ".join(foreign),
            where="prune / compact",
            fix="attach(model, structure) builds a structure directly",
        )
    kept, sizes = torch.zeros_like(bank.kept), {key: path.units for key, path in paths}
    for record in structure.paths:
        where = bank.slices.get(record.key)
        if where is None or sizes[record.key] != record.of:
            raise AttachError(
                "this structure was made from other candidates",
                expected="a structure of these adapters",
                got=f"path {record.key} with {record.of} units",
                where="prune / compact",
                fix="attach(model, structure) builds a structure directly",
            )
        for task, units in record.units.items():
            columns = [where.start + (unit if where.stop - where.start > 1 else 0) for unit in units]
            kept[tasks.index(task), columns] = 1.0
    return kept


def build_structure(
    bank: GateBank,
    kept: Tensor,
    paths: Mapping[str, Path],
    *,
    tasks: Sequence[str],
    space: SearchSpace,
    budget: Budget | None,
    identity: Fingerprint,
    seed: int,
) -> Structure:
    """Describe the units in `kept`, (tasks, units), as a Structure."""
    with torch.no_grad():
        probability = bank.open_probability()
    records = []
    for group in bank.groups:
        where = bank.slices[group.key]
        own = kept[:, where].expand(-1, group.units) if where.stop - where.start == 1 else kept[:, where]
        units = {task: tuple(own[t].nonzero().flatten().tolist()) for t, task in enumerate(tasks)}
        union = {unit for chosen in units.values() for unit in chosen}
        if not union:
            continue
        path = paths[group.key]
        p = probability[:, where].expand(-1, group.units)
        records.append(
            KeptPath(
                key=group.key,
                options=path.options_of(sorted(union)),
                site=SiteRecord.model_validate(path.site.to_dict()),
                of=group.units,
                units={task: chosen for task, chosen in units.items() if chosen},
                params=int(group.params) * len(union),
                flops=group.flops * len(union),
                open_probability={t: round(float(p[i].mean()), 6) for i, t in enumerate(tasks)},
            )
        )
    return Structure(
        fingerprint=identity,
        space=space,
        tasks=tuple(tasks),
        paths=tuple(records),
        offered=offers(bank, paths),
        seed=seed,
        budget=budget,
        dense_params=int(bank.dense_cost()),
        created_with=versions(),
    )


def offers(bank: GateBank, paths: Mapping[str, Path]) -> tuple[Offer, ...]:
    """The candidates of the search, those of equal kind, role and size in different blocks together."""
    blocks: dict[tuple[str, str, str, int], list[int]] = {}
    for group in bank.groups:
        site = paths[group.key].site
        blocks.setdefault((site.sublayer, site.role, paths[group.key].kind, group.units), []).append(site.block_index)
    return tuple(
        Offer(sublayer=sublayer, role=role, kind=kind, of=of, blocks=tuple(found))
        for (sublayer, role, kind, of), found in blocks.items()
    )
