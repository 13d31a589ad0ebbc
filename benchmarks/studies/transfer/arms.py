"""The arms: each attaches its adapters to a base and returns the options of the trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gatedadapters as ga
from benchmarks.common.models import lora_space
from benchmarks.common.training import attach_best, dense_cost
from benchmarks.studies.transfer.cells import DROP, Cell
from gatedadapters.transfer import prefer_transferable

CANDIDATE_RANK, SHARE = 16, 0.25  # every arm: the parameters of LoRA rank 4 at every linear map


def uniform(model: nn.Module, cell: Cell, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """LoRA of one rank at every linear map."""
    return fixed(model, cell, lora_space(CANDIDATE_RANK))


def attention_only(model: nn.Module, cell: Cell, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """LoRA at the attention maps only, of the same size in all."""
    return fixed(model, cell, lora_space(3 * CANDIDATE_RANK, sublayers=["attention"]))


def dropout(model: nn.Module, cell: Cell, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Control: uniform LoRA, and ordinary dropout of the same rate on what attention returns."""
    modules = dict(model.named_modules())
    for block in ga.discover(model).blocks:
        for sublayer in block.sublayers:
            if sublayer.kind == "attention" and sublayer.writer is not None:
                modules[sublayer.writer].register_forward_hook(Dropout(DROP))
    return uniform(model, cell, batches)


def gated(model: nn.Module, cell: Cell, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """A searched structure."""
    size = _size(model)
    ga.attach(model, lora_space(CANDIDATE_RANK), seed=cell.seed)
    return {"budget": ga.Budget(params=size)}


def gated_preferring(model: nn.Module, cell: Cell, batches: list[dict[str, Tensor]]) -> dict[str, Any]:
    """A searched structure, the penalty weighed by how far masking knowledge moves a place."""
    options = gated(model, cell, batches)
    prefer_transferable(ga.get_adapters(model), batches)
    return options


BY_NAME: dict[str, Callable[[nn.Module, Cell, list[dict[str, Tensor]]], dict[str, Any]]] = {
    "uniform": uniform,
    "dropout": dropout,
    "attention": attention_only,
    "gated": gated,
    "gated-preferring": gated_preferring,
}


class Dropout:
    """Ordinary dropout on a module's output."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook."""
        first = output if isinstance(output, Tensor) else output[0]
        dropped = F.dropout(first, self.share, module.training)
        return dropped if isinstance(output, Tensor) else (dropped, *output[1:])


def fixed(model: nn.Module, cell: Cell, space: ga.SearchSpace) -> dict[str, Any]:
    """Attach the structure of the common size whose ranks are as even as it allows."""
    attach_best(model, space, _size(model), _evenly, seed=cell.seed)
    return {}


def _size(model: nn.Module) -> int:
    return int(SHARE * dense_cost(model, lora_space(CANDIDATE_RANK)))


def _evenly(bank: Any) -> Tensor:
    """Scores that fill rank by rank."""
    scores = torch.zeros_like(bank.kept)
    for where in bank.slices.values():
        scores[:, where] = 1000.0 - torch.arange(where.stop - where.start)
    return scores
