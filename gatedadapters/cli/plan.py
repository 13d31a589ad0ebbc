"""Count candidates, gates, parameters and memory of a model and a search space, without loading any weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gatedadapters.backbone import discover
from gatedadapters.config import Budget, SearchSpace
from gatedadapters.errors import ConfigError
from gatedadapters.experiments.models import is_causal, located, reading
from gatedadapters.gates import GateBank, check_budget
from gatedadapters.reporting.tables import format_table
from gatedadapters.structure import column
from gatedadapters.supernet.attach import candidates, groups

_TYPES = {"fp32": 4, "bf16": 2}
_GRADIENT, _ADAM = 4, 8  # bytes for each fp32 value that is trained


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, a config.json, or bundled:NAME")
    parser.add_argument("space", metavar="SPACE", help="a preset or a YAML file")
    parser.add_argument("--tasks", type=int, default=1, help="number of tasks, each with gates of its own (1)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--fraction", type=float, help="show what Budget(fraction=...) leaves")
    budget.add_argument("--params", type=int, help="show what Budget(params=...) leaves")
    budget.add_argument("--flops", type=float, help="show what Budget(flops=...) leaves")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> None:
    """Do it."""
    given = {name: getattr(options, name) for name in ("fraction", "params", "flops")}
    given = {name: value for name, value in given.items() if value is not None}
    budget = Budget.parse(given, where="budget") if given else None
    if options.tasks < 1:
        raise ConfigError(expected="one task or more", got=options.tasks, where="--tasks", fix="count your tasks")
    space = SearchSpace.load(options.space)
    found = plan(build_on_meta(options.model), space, n_tasks=options.tasks, budget=budget)
    print(json.dumps(found, indent=1) if options.json else as_text(found))


def build_on_meta(name: str) -> nn.Module:
    """A model of the right shape without storage.

    Raises:
        ConfigError: there is no readable configuration of that name.
    """
    place = located(name)
    with reading(name, "a folder with a config.json, such a file, or the id of a model on the hub"):
        shape = AutoConfig.from_pretrained(place)
        kind = AutoModelForCausalLM if is_causal(shape) else AutoModel
        with torch.device("meta"):
            model: nn.Module = kind.from_config(shape)  # type: ignore[no-untyped-call]
    return model


def plan(model: nn.Module, space: SearchSpace, *, n_tasks: int = 1, budget: Budget | None = None) -> dict[str, Any]:
    """Everything there is to know before training, as plain data; bytes, parameters, flops per token.

    Raises:
        LayoutError: the model's blocks were not found.
        PathError: the space selects nothing of it.
        BudgetError: the budget is below the smallest candidate.
    """
    layout = discover(model)
    offered, skipped_sites = candidates(space, layout)
    bank = GateBank(groups(offered, n_tasks), space.gates, tasks=n_tasks, seed=0)
    places: dict[str, dict[str, float]] = {}
    for group in bank.groups:
        options, site = offered[group.key]
        row = places.setdefault(column(site.sublayer, site.role, options.kind), {"paths": 0, "units": 0, "params": 0})
        row["paths"] += 1
        row["units"] += group.units
        row["params"] += group.units * group.params
    dense = int(bank.dense_cost())
    weights = sum(parameter.numel() for parameter in model.parameters())
    trained = dense + n_tasks * bank.n_gates
    memory = {
        name: {
            "weights": weights * size,
            "adapters and gates": trained * 4,
            "gradients": trained * _GRADIENT,
            "AdamW": trained * _ADAM,
            "total": weights * size + trained * (4 + _GRADIENT + _ADAM),
        }
        for name, size in _TYPES.items()
    }
    result = {
        "model": layout.model_class,
        "blocks": len(layout.blocks),
        "weights": weights,
        "space": space.name,
        "tasks": n_tasks,
        "places": places,
        "paths": len(offered),
        "units": bank.n_units,
        "gates": n_tasks * bank.n_gates,
        "params": dense,
        "flops": bank.dense_cost("flops"),
        "memory": memory,
        "skipped_sites": [f"{skipped.kind} at {skipped.module}: {skipped.reason}" for skipped in skipped_sites],
        "unknown": [f"{unknown.name}: {unknown.reason}" for unknown in layout.unknown],
    }
    if budget is not None:
        limit = check_budget(bank, budget)
        result["budget"] = {
            "given": budget.model_dump(exclude_none=True),
            "unit": budget.unit,
            "at most": limit,
            "share": limit / bank.dense_cost(budget.unit),
            "bytes": {name: int(limit) * size for name, size in _TYPES.items()} if budget.unit == "params" else None,
        }
    return result


def as_text(found: Mapping[str, Any]) -> str:
    """A plan for reading."""
    rows = [
        [place, f"{row['paths']:,.0f}", f"{row['units']:,.0f}", f"{row['params']:,.0f}"]
        for place, row in found["places"].items()
    ]
    rows.append(["all", f"{found['paths']:,}", f"{found['units']:,}", f"{found['params']:,}"])
    parts = list(found["memory"]["fp32"])
    memory = [[part, *(_bytes(found["memory"][name][part]) for name in _TYPES)] for part in parts]
    share = found["params"] / found["weights"]
    blocks = [
        f"{found['model']}: {found['blocks']} blocks, {found['weights']:,} parameters\n"
        f"{found['space']}: {found['paths']:,} candidate paths, {found['gates']:,} gates, "
        f"{found['params']:,} parameters when dense ({share:.3%} of the model)",
        format_table(["candidates", "paths", "units", "parameters"], rows),
        format_table(["memory without activations, weights in", *_TYPES], memory),
    ]
    if "budget" in found:
        blocks.append(_budget_text(found["budget"]))
    blocks += _listed("does not fit, left out", found["skipped_sites"])
    blocks += _listed("not understood, left alone", found["unknown"])
    return "\n\n".join(blocks)


def _budget_text(budget: Mapping[str, Any]) -> str:
    given = ", ".join(f"{name}={value}" for name, value in budget["given"].items())
    what = "parameters" if budget["unit"] == "params" else "flops per token"
    text = f"Budget({given}) leaves at most {budget['at most']:,.0f} {what}, {budget['share']:.2%} of the candidates"
    if budget["bytes"] is not None:
        text += f"; saved: {_bytes(budget['bytes']['fp32'])} in fp32, {_bytes(budget['bytes']['bf16'])} in bf16"
    return text


def _listed(title: str, lines: Sequence[str], limit: int = 8) -> list[str]:
    if not lines:
        return []
    more = [f"  ... and {len(lines) - limit} more"] if len(lines) > limit else []
    return ["\n".join([f"{title}:", *(f"  {line}" for line in lines[:limit]), *more])]


def _bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError
