"""Does a searched structure beat a guessed one of the same size?

Claim under test: at equal parameter count and equal training steps, the structure that one gated run finds scores above
a random structure and no worse than uniform rank, attention-only LoRA, or dense training truncated by SVD; every arm
with its own learning rate, tuned on validation data; scores on test data, after pruning.

    python -m benchmarks search_quality run       # computes the cells that are missing
    python -m benchmarks search_quality table     # prints the tables from the stored cells

A killed run goes on where it stopped; several processes may run side by side.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from torch import nn
from transformers import Trainer, set_seed

import gatedadapters as ga
from benchmarks.common.command import carry_out, parser
from benchmarks.common.peft_rivals import ranks_of
from benchmarks.common.store import Result
from benchmarks.common.training import training_arguments
from benchmarks.studies.search_quality.arms import BY_NAME
from benchmarks.studies.search_quality.cells import ARMS, COMPARISONS, PEFT_ARMS, SEEDS, STORE, Cell
from benchmarks.studies.search_quality.table import tables
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset
from gatedadapters.data.bundled import load_encoder, load_task
from gatedadapters.experiments.evaluation import score_tasks
from gatedadapters.reporting.versions import versions

BATCH, MAX_LENGTH, TEST = 16, 32, 1000


def compute(cell: Cell) -> Result:
    """Train and score one cell."""
    set_seed(cell.seed)
    backbone, tokenizer = load_encoder(cell.model)
    task = load_task(cell.task, train=cell.train, validation=1000, test=TEST, seed=cell.seed)
    set_seed(cell.seed)
    model = ga.MultiTaskClassifier(backbone, {task.name: task.n_classes})
    collate = MixedTaskCollator(tokenizer)
    data = MixedTaskDataset([task], tokenizer, "train", MAX_LENGTH)
    batches = [collate([data[i + j] for j in range(BATCH)]) for i in range(0, 512, BATCH)]
    options = BY_NAME[cell.arm](model, cell, batches)
    args = training_arguments(steps=cell.steps, batch=BATCH, rate=cell.rate, seed=cell.seed)
    trainer_class = Trainer if cell.arm in PEFT_ARMS else ga.GatedTrainer
    trainer = trainer_class(model, args, train_dataset=data, data_collator=collate, **options)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    shape = ranks_of(model) if cell.arm in PEFT_ARMS else compacted(model)
    return {
        "cell": asdict(cell),
        "score": score_tasks(model, [task], tokenizer, MAX_LENGTH, split=cell.split)[task.name].accuracy,
        "params": sum(ranks * each for ranks, each in shape.values()),
        "seconds": round(seconds, 1),
        "structure": {key: ranks for key, (ranks, _) in shape.items()},
        "versions": versions(),
    }


def compacted(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Compact the adapters; (units, parameters of a unit) of every path that stays."""
    adapters = ga.get_adapters(model)
    if adapters.bank is not None:
        adapters.compact()
    return {record.key: (len(record.kept), record.params // len(record.kept)) for record in adapters.structure.paths}


def run(cell: Cell) -> Result:
    """The result of a cell, computed if nobody has."""
    return STORE.computed(cell.name, lambda: compute(cell))


def run_all(only: Sequence[str], seeds: Sequence[int], arms: Sequence[str]) -> None:
    """Compute what is missing: of each comparison, tune every arm, then go seed by seed, so that pairs complete early.

    Args:
        only: comparisons, by task or as task:budget; default: all.
        seeds: which of them.
        arms: which of them.
    """
    for comparison in COMPARISONS:
        label = f"{comparison.task}:{comparison.budget:g}"
        if only and label not in only and comparison.task not in only:
            continue
        rates = {arm: comparison.rate(arm, run) for arm in comparison.arms if arm in arms}
        for seed in seeds:
            for arm, rate in rates.items():
                assert rate is not None
                result = run(Cell(comparison.task, comparison.budget, arm, rate, seed))
                print(f"{label} {arm} seed {seed} rate {rate:g}: {result['score']:.3f}", flush=True)


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("search_quality", __doc__, threads=1)
    made.add_argument("--only", nargs="*", default=[], help="comparisons, e.g. newsgroups:0.125 or tweets")
    made.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    made.add_argument("--seeds", nargs="*", type=int, default=SEEDS, help="to share the work out between processes")
    options = made.parse_args(arguments)
    carry_out(options, run=lambda: run_all(options.only, options.seeds, options.arms), table=tables, pack=STORE.pack)
