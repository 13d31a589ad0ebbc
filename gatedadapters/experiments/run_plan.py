"""The run `plan`: count what a search space costs on a model, without loading weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gatedadapters.backbone import discover
from gatedadapters.config import Budget, SearchSpace
from gatedadapters.errors import ConfigError
from gatedadapters.experiments.models import is_causal, locate_model, reading_model
from gatedadapters.gates import GateBank, check_budget
from gatedadapters.reporting.tables import format_table
from gatedadapters.safe_files import file_errors
from gatedadapters.structure import column
from gatedadapters.supernet.attach import candidates, gate_groups
from gatedadapters.supernet.reach import Reach

_BYTES = {"fp32": 4, "bf16": 2}  # of one weight of the backbone
_TRAINED, _GRADIENT, _ADAM = 4, 4, 8  # bytes of a trained fp32 value, its gradient, and AdamW's two moments


@dataclass(frozen=True)
class PlacePlan:
    """The candidates of one kind at one role of all blocks, such as LoRA at `ffn.down`.

    Attributes:
        paths: number of candidate paths.
        units: number of their ranks or widths.
        params: number of their parameters.
    """

    paths: int
    units: int
    params: int


@dataclass(frozen=True)
class BudgetPlan:
    """What a budget leaves of the candidates.

    Attributes:
        budget: the budget.
        limit: the most that may be kept, in parameters or in flops per token.
        share: the limit as a share of the cost of all candidates.
    """

    budget: Budget
    limit: float
    share: float

    @property
    def bytes(self) -> dict[str, int] | None:
        """Bytes of the saved weights, by number format; None for a budget in flops."""
        return {name: int(self.limit) * size for name, size in _BYTES.items()} if self.budget.unit == "params" else None

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.budget.model_dump(exclude_none=True).items())
        what = "parameters" if self.budget.unit == "params" else "flops per token"
        text = f"Budget({given}) leaves at most {self.limit:,.0f} {what}, {self.share:.2%} of the candidates"
        if self.bytes is not None:
            text += f"; saved: {_as_bytes(self.bytes['fp32'])} in fp32, {_as_bytes(self.bytes['bf16'])} in bf16"
        return text


@dataclass(frozen=True)
class Plan:
    """What a search space offers and costs on a model. Its text is what `gatedadapters plan` prints.

    Attributes:
        model: name of the model's class.
        blocks: number of its blocks.
        weights: number of its parameters.
        space: name of the search space.
        tasks: number of tasks, each with gates of its own.
        places: candidates by sub-layer, role and kind.
        gates: number of gates, of all tasks together.
        flops: cost of all candidates in a forward pass, per token.
        skipped_sites: points where a candidate does not fit, with the reason.
        unknown: modules that discovery did not understand, with the reason.
        reach: the share of blocks and matrices at which candidates stand, and what is left, with the way to it.
        budget: what the budget leaves; None if none was given.
        processes: number of processes over which FSDP2 spreads the weights; 1 without sharding.
        tokens: tokens of one process's micro-batch, for the activations.
        hidden: width of the hidden state.
        largest_block: parameters of the largest block.
        outside: parameters outside the blocks.
        activations_of_a_token: numbers that a forward pass keeps for backward, for each token.
        logits_of_a_token: size of the vocabulary, or of the output.
    """

    model: str
    blocks: int
    weights: int
    space: str
    tasks: int
    places: dict[str, PlacePlan]
    gates: int
    flops: float
    skipped_sites: tuple[str, ...]
    unknown: tuple[str, ...]
    reach: Reach
    budget: BudgetPlan | None
    processes: int = 1
    tokens: int = 0
    hidden: int = 0
    largest_block: int = 0
    outside: int = 0
    activations_of_a_token: int = 0
    logits_of_a_token: int = 0

    @property
    def paths(self) -> int:
        """Number of all candidate paths."""
        return sum(place.paths for place in self.places.values())

    @property
    def units(self) -> int:
        """Number of units of all candidates."""
        return sum(place.units for place in self.places.values())

    @property
    def params(self) -> int:
        """Number of parameters of all candidates."""
        return sum(place.params for place in self.places.values())

    @property
    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes that training takes without activations, by number format of the backbone and by part."""
        trained = self.params + self.gates
        return {
            name: {
                "weights": self.weights * size,
                "adapters and gates": trained * _TRAINED,
                "gradients": trained * _GRADIENT,
                "AdamW": trained * _ADAM,
                "total": self.weights * size + trained * (_TRAINED + _GRADIENT + _ADAM),
            }
            for name, size in _BYTES.items()
        }

    @property
    def memory_of_a_process(self) -> dict[str, dict[str, int]]:
        """Bytes that training takes on each of `processes`, by number format of the backbone and by part.

        A process holds its share of the weights and, while they are used, what lies outside the blocks and three
        blocks, gathered: one that computes, the buffer that it was gathered into, and that of its neighbour. On one
        process nothing is gathered. Adapters, their gradients and moments are held by every process,
        and their gradients once more while they are exchanged. Activations are what every linear map of the blocks
        reads and returns, and logits three times in fp32 (with their probabilities and gradient). With checkpointing,
        what each block reads is kept, and the activations of one block.
        """
        trained = self.params + self.gates
        found = {}
        for name, size in _BYTES.items():
            gathered = (3 * self.largest_block + self.outside) * size if self.processes > 1 else 0
            parts = {
                "weights": -(-self.weights * size // self.processes),
                "weights gathered": gathered,
                "adapters and gates": trained * _TRAINED,
                "gradients": trained * _GRADIENT * (2 if self.processes > 1 else 1),
                "AdamW": trained * _ADAM,
                "activations": self.tokens * (self.activations_of_a_token * size + 3 * 4 * self.logits_of_a_token),
            }
            kept = self.blocks * self.hidden + self.activations_of_a_token // self.blocks
            checkpointed = self.tokens * (kept * size + 3 * 4 * self.logits_of_a_token)
            total = sum(parts.values())
            found[name] = parts | {
                "total": total,
                "activations, checkpointed": checkpointed,
                "total, checkpointed": total - parts["activations"] + checkpointed,
            }
        return found

    def table(self) -> str:
        """Paths, units and parameters of the candidates, by sub-layer, role and kind."""
        rows = [
            [name, f"{place.paths:,}", f"{place.units:,}", f"{place.params:,}"] for name, place in self.places.items()
        ]
        rows.append(["all", f"{self.paths:,}", f"{self.units:,}", f"{self.params:,}"])
        return format_table(["candidates", "paths", "units", "parameters"], rows)

    def to_data(self) -> dict[str, Any]:
        """Everything as plain data; what `gatedadapters plan --json` prints."""
        data: dict[str, Any] = {
            "model": self.model,
            "blocks": self.blocks,
            "weights": self.weights,
            "space": self.space,
            "tasks": self.tasks,
            "places": {
                name: {"paths": place.paths, "units": place.units, "params": place.params}
                for name, place in self.places.items()
            },
            "paths": self.paths,
            "units": self.units,
            "gates": self.gates,
            "params": self.params,
            "flops": self.flops,
            "memory": self.memory,
            "processes": self.processes,
            "tokens": self.tokens,
            "memory of a process": self.memory_of_a_process,
            "skipped_sites": list(self.skipped_sites),
            "misfits": list(self.skipped_sites),  # the name of 0.1, for one release
            "unknown": list(self.unknown),
            "reach": self.reach.to_data(),
        }
        if self.budget is not None:
            data["budget"] = {
                "given": self.budget.budget.model_dump(exclude_none=True),
                "unit": self.budget.budget.unit,
                "at most": self.budget.limit,
                "share": self.budget.share,
                "bytes": self.budget.bytes,
            }
        return data

    def __str__(self) -> str:
        memory = self.memory
        rows = [[part, *(_as_bytes(memory[name][part]) for name in _BYTES)] for part in memory["fp32"]]
        parts = [
            f"{self.model}: {self.blocks} blocks, {self.weights:,} parameters\n"
            f"{self.space}: {self.paths:,} candidate paths, {self.gates:,} gates, "
            f"{self.params:,} parameters when dense ({self.params / self.weights:.3%} of the model)\n"
            f"{self.reach.summary}",
            self.table(),
            *([self.reach.table()] if self.reach.left else []),
            format_table(["memory without activations, weights in", *_BYTES], rows),
        ]
        if self.processes > 1:
            each = self.memory_of_a_process
            rows = [[part, *(_as_bytes(each[name][part]) for name in _BYTES)] for part in each["fp32"]]
            title = f"memory of each of {self.processes} processes, {self.tokens:,} tokens each, weights in"
            parts.append(format_table([title, *_BYTES], rows))
        if self.budget is not None:
            parts.append(str(self.budget))
        parts += _listed("does not fit, left out", self.skipped_sites)
        return "\n\n".join(parts)


@file_errors("read or write a file of the run", "plan")
def plan(
    model: nn.Module | str | Path,
    space: SearchSpace | str | Path,
    *,
    tasks: int = 1,
    budget: Budget | None = None,
    processes: int = 1,
    tokens: int = 4096,
) -> Plan:
    """Count what a search would offer and cost, before any training, as `gatedadapters plan` does.

    Args:
        model: a model; or a folder, a hub id, a `config.json`, or `bundled:NAME`, of which no weights are loaded.
        space: a search space, the name of a preset, or a YAML file.
        tasks: number of tasks, each with gates of its own.
        budget: a budget to resolve against the candidates.
        processes: number of processes over which FSDP2 spreads the weights; the plan then shows the memory of each.
        tokens: tokens of one process's micro-batch.

    Raises:
        ConfigError: there is no such space or model, or `tasks`, `processes` or `tokens` is below one.
        LayoutError: discovery does not find the blocks of the model.
        PathError: the space selects no point of the model.
        BudgetError: the budget is below the smallest candidate.
    """
    if tasks < 1:
        raise ConfigError(expected="one task or more", got=tasks, where="--tasks", fix="count your tasks")
    for name, number in ("processes", processes), ("tokens", tokens):
        if number < 1:
            raise ConfigError(expected="1 or more", got=number, where=f"--{name}", fix=f"give the number of {name}")
    space = space if isinstance(space, SearchSpace) else SearchSpace.load(space)
    model = model if isinstance(model, nn.Module) else build_on_meta(str(model))
    layout = discover(model)
    offered, skipped_sites = candidates(space, layout)
    bank = GateBank(gate_groups(offered, tasks), space.gates, tasks=tasks, seed=0)
    places: dict[str, PlacePlan] = {}
    for group in bank.groups:
        options, site = offered[group.key]
        name = column(site.sublayer, site.role, options.kind)
        so_far = places.get(name, PlacePlan(0, 0, 0))
        params = so_far.params + group.units * int(group.params)
        places[name] = PlacePlan(so_far.paths + 1, so_far.units + group.units, params)
    allowed = None
    if budget is not None:
        limit = check_budget(bank, budget)
        allowed = BudgetPlan(budget, limit, limit / bank.dense_cost(budget.unit))
    inside = {b.name: sum(p.numel() for p in model.get_submodule(b.name).parameters()) for b in layout.blocks}
    return Plan(
        model=layout.model_class,
        blocks=len(layout.blocks),
        weights=sum(parameter.numel() for parameter in model.parameters()),
        space=space.name,
        tasks=tasks,
        places=places,
        gates=tasks * bank.n_gates,
        flops=bank.dense_cost("flops"),
        skipped_sites=tuple(f"{skipped.kind} at {skipped.module}: {skipped.reason}" for skipped in skipped_sites),
        unknown=tuple(f"{unknown.name}: {unknown.reason}" for unknown in layout.unknown),
        reach=Reach.of(model, layout, [site for _, site in offered.values()], skipped_sites),
        budget=allowed,
        processes=processes,
        tokens=tokens,
        hidden=layout.hidden_size,
        largest_block=max(inside.values()),
        outside=sum(parameter.numel() for parameter in model.parameters()) - sum(inside.values()),
        activations_of_a_token=sum(m.in_features + m.out_features for _, _, m in layout.maps()),
        logits_of_a_token=max((m.out_features for m in layout.outside if m.role == "head"), default=0),
    )


def build_on_meta(name: str) -> nn.Module:
    """A model on the meta device, whose weights have shapes and take no memory.

    Raises:
        ConfigError: the configuration of the model cannot be read.
    """
    place = locate_model(name)
    with reading_model(name, "a folder with a config.json, such a file, or the id of a model on the hub"):
        model_config = AutoConfig.from_pretrained(place)
        kind = AutoModelForCausalLM if is_causal(model_config) else AutoModel
        with torch.device("meta"):
            model: nn.Module = kind.from_config(model_config)  # type: ignore[no-untyped-call]
    return model


def _listed(title: str, lines: Sequence[str], limit: int = 8) -> list[str]:
    """A list of one paragraph with at most `limit` lines; an empty list if there are no lines."""
    if not lines:
        return []
    more = [f"  ... and {len(lines) - limit} more"] if len(lines) > limit else []
    return ["\n".join([f"{title}:", *(f"  {line}" for line in lines[:limit]), *more])]


def _as_bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError
