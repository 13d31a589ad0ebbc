"""Rivals of a search: structures of the same size that nobody searched, uniform or random."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gatedadapters.config import SearchSpace
from gatedadapters.config.search import Rival
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import attach, detach

RIVAL_NAMES: Mapping[Rival, str] = {"uniform": "uniform LoRA", "random": "random structure"}


def uniform_space(model: nn.Module, size: int) -> SearchSpace:
    """LoRA at every linear map of `model`, with enough ranks to spend `size` parameters evenly."""
    rank_one = attach(model, SearchSpace.parse({"paths": [{"kind": "lora", "rank": 1}]}, where="uniform"))
    assert rank_one.bank is not None
    rank = int(size // rank_one.bank.dense_cost()) + 1
    detach(model)
    return SearchSpace.parse({"name": "uniform", "paths": [{"kind": "lora", "rank": rank}]}, where="uniform")


def uniform_scores(adapters: Adapters) -> Tensor:
    """Scores, shape (tasks, units), under which every path gets its first rank before any gets its second.

    The k-th rank of a path scores -k, plus a random number below 1/2 that breaks ties and is always the same.
    """
    assert adapters.bank is not None
    bank = adapters.bank
    scores = torch.zeros(bank.n_units)
    for where in bank.slices.values():
        scores[where] = -torch.arange(where.stop - where.start, dtype=torch.float32)
    tie_breaks = torch.rand(bank.n_units, generator=torch.Generator().manual_seed(0))
    return (scores + 0.5 * tie_breaks).expand(bank.tasks, -1)


def random_scores(adapters: Adapters, seed: int) -> Tensor:
    """Random scores, shape (tasks, units). They are the same for all tasks, which then share all that is stored."""
    assert adapters.bank is not None
    bank = adapters.bank
    return torch.rand(bank.n_units, generator=torch.Generator().manual_seed(seed)).expand(bank.tasks, -1)
