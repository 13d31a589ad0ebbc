"""Does a searched structure beat a guessed one of the same size?

Claim under test: at equal parameter count and equal training steps, the structure that one gated run finds scores above a
random structure and no worse than uniform rank, attention-only LoRA, or dense training truncated by SVD; every arm with
its own learning rate, tuned on validation data; scores on test data, after pruning.

    python benchmarks/search_quality.py run       # computes the cells that are missing, one JSON file each
    python benchmarks/search_quality.py table     # prints the tables from the stored cells

A killed run goes on where it stopped; several processes may run side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments, set_seed

import gatedadapters as ga
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset
from gatedadapters.data.bundled import load_encoder, load_task
from gatedadapters.selection import versions

STORE = Path(__file__).parent / "results" / "search_quality"
BATCH, MAX_LENGTH, TEST = 16, 40, 2000


@dataclass(frozen=True)
class Cell:
    """One training run: everything its result depends on."""

    task: str
    budget: float
    arm: str
    rate: float
    seed: int
    steps: int = 300
    model: str = "minilm-l3"
    train: int = 1000
    split: str = "test"

    @property
    def file(self) -> Path:
        """Where its result is stored."""
        fields = (self.model, self.task, f"{self.budget:.5f}", self.arm, f"{self.rate:g}", self.steps, self.split, self.seed)
        return STORE / ("_".join(map(str, fields)) + ".json")


# -- arms --------------------------------------------------------------------------------------------------------------


def searched(model: nn.Module, cell: Cell) -> dict[str, Any]:
    """One gated run: warm-up, ramp, prune, fine-tune the survivors."""
    ga.attach(model, "lora-all-linear", seed=cell.seed)
    return {"budget": ga.Budget(fraction=cell.budget)}


def random_structure(model: nn.Module, cell: Cell) -> dict[str, Any]:
    """A random structure of the same size, trained from the first step."""
    return _fixed(model, cell, "lora-all-linear", lambda bank: torch.rand(bank.kept.shape, generator=_generator(cell)))


def uniform(model: nn.Module, cell: Cell) -> dict[str, Any]:
    """The same rank everywhere, or rank 1 at evenly spaced maps where the budget is below rank 1."""
    return _fixed(model, cell, "lora-all-linear", _evenly)


def attention_only(model: nn.Module, cell: Cell) -> dict[str, Any]:
    """LoRA at the attention maps only, ranks as even as the budget allows."""
    return _fixed(model, cell, "attention-only", _evenly)


def svd(model: nn.Module, cell: Cell) -> dict[str, Any]:
    """Dense training, cut to the budget by singular values when the search would prune, then fine-tuned alike."""
    space = ga.SearchSpace.load("lora-all-linear").with_gates(stochastic=False, init_spread=0.0)
    ga.attach(model, space, seed=cell.seed)
    return {"gate_learning_rate": 1e-30, "callbacks": [TruncateBySVD(ga.Budget(fraction=cell.budget), at=0.65)]}


class TruncateBySVD(TrainerCallback):
    """Rotates every path's ranks into singular directions and keeps the largest singular values that fit."""

    def __init__(self, budget: ga.Budget, at: float) -> None:
        self.budget, self.at = budget, at

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **kwargs: Any) -> None:
        """At `at` of the steps, once."""
        adapters = ga.get_adapters(model)
        if adapters.bank.frozen or state.global_step < self.at * state.max_steps:
            return
        scores = torch.zeros_like(adapters.bank.kept)
        inner = getattr(optimizer, "optimizer", optimizer)
        for key, path in adapters.paths.items():
            u, s, v = torch.linalg.svd(path.up @ path.down, full_matrices=False)
            r = path.units
            path.up.copy_(u[:, :r] * s[:r].sqrt())
            path.down.copy_(s[:r].sqrt()[:, None] * v[:r])
            scores[:, adapters.bank.slices[key]] = s[:r]
            for parameter in (path.up, path.down):
                inner.state.pop(parameter, None)  # its moments belong to the unrotated ranks
        adapters.prune(adapters.discretize(self.budget, scores=scores))


def _fixed(model: nn.Module, cell: Cell, preset: str, scores: Callable[[Any], Tensor]) -> dict[str, Any]:
    full = ga.attach(model, "lora-all-linear", seed=cell.seed)
    budget = ga.Budget(params=int(full.bank.dense_cost() * cell.budget))
    ga.detach(model)
    candidates = ga.attach(model, preset, seed=cell.seed)
    structure = candidates.discretize(budget, scores=scores(candidates.bank))
    ga.detach(model)
    ga.attach(model, structure, seed=cell.seed)
    return {}


def _evenly(bank: Any) -> Tensor:
    """Scores that fill rank by rank, and within a rank spread over the maps."""
    groups = len(bank.groups)
    order = {key: i for i, key in enumerate(bank.slices)}
    scores = torch.zeros_like(bank.kept)
    for key, where in bank.slices.items():
        spread = (order[key] * 0.6180339887) % 1.0  # a low-discrepancy order, so that any prefix is spread evenly
        scores[:, where] = 2.0 - torch.arange(where.stop - where.start) - 0.5 * spread + 0 * groups
    return scores - scores.min() + 1


def _generator(cell: Cell) -> torch.Generator:
    return torch.Generator().manual_seed(7919 * cell.seed + 17)


ARMS: dict[str, Callable[[nn.Module, Cell], dict[str, Any]]] = {
    "searched": searched,
    "random": random_structure,
    "uniform": uniform,
    "attention": attention_only,
    "svd": svd,
}


# -- one cell ----------------------------------------------------------------------------------------------------------


def compute(cell: Cell, arm: Callable[[nn.Module, Cell], dict[str, Any]]) -> dict[str, Any]:
    """Train and score one cell."""
    set_seed(cell.seed)
    backbone, tokenizer = load_encoder(cell.model)
    task = load_task(cell.task, train=cell.train, validation=1000, test=TEST, seed=cell.seed)
    set_seed(cell.seed)
    model = ga.MultiTaskClassifier(backbone, {task.name: task.n_classes})
    options = arm(model, cell)
    args = TrainingArguments(
        output_dir=str(STORE / ".scratch" / str(os.getpid())), max_steps=cell.steps, per_device_train_batch_size=BATCH,
        learning_rate=cell.rate, warmup_steps=round(0.06 * cell.steps), weight_decay=0.0, seed=cell.seed, bf16=True,
        use_cpu=not torch.cuda.is_available(), report_to=[], save_strategy="no", logging_steps=cell.steps, disable_tqdm=True,
    )  # fmt: skip
    trainer = ga.GatedTrainer(
        model, args, train_dataset=MixedTaskDataset([task], tokenizer, "train", MAX_LENGTH),
        data_collator=MixedTaskCollator(tokenizer), **options,
    )  # fmt: skip
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    adapters = ga.get_adapters(model)
    if adapters.bank is not None:
        adapters.compact()
    params = sum(p.numel() for p in adapters.paths.parameters())
    score = accuracy(model, MixedTaskDataset([task], tokenizer, cell.split, MAX_LENGTH), MixedTaskCollator(tokenizer))
    shape = {record.key: len(record.kept) for record in adapters.structure.paths}
    return {
        "cell": asdict(cell), "score": score, "params": params, "seconds": round(seconds, 1), "structure": shape,
        "loss": trainer.state.log_history[0].get("loss"), "versions": versions(),
    }  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, dataset: Any, collate: Any, batch: int = 64) -> float:
    """Share of examples whose class is found; examples sorted by length, so that little is padding."""
    model.eval()
    order = sorted(range(len(dataset)), key=lambda i: len(dataset[i]["input_ids"]))
    right = 0
    for start in range(0, len(order), batch):
        inputs = collate([dataset[i] for i in order[start : start + batch]])
        labels = inputs.pop("labels")
        with torch.autocast("cpu", torch.bfloat16):
            right += int((model(**inputs).logits.argmax(-1) == labels).sum())
    return right / len(order)
