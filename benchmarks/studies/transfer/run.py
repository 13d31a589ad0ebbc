"""Do adapters survive an update of their base, and does weakening feed-forward knowledge help them?

Claims under test, on all-MiniLM-L6-v2 and a later fine-tune of it by other people (a real update), and on SmolLM2-135M
and its own continued pretraining: knowledge dropping while an adapter trains (Trans-PEFT, arXiv 2506.06844) reduces
what the adapter loses on the new base, by more than the interval, at a cost of at most a point on the old base;
ordinary dropout of the same rate does not; and the update moved feed-forward activations more than attention's.

    python -m benchmarks transfer run       # computes the cells that are missing
    python -m benchmarks transfer carry [--only minilm newsgroups seed0] [--limit 3]
    python -m benchmarks transfer table     # prints the tables from the stored cells

`carry` computes the cells of a second question: what of a carried adapter a short repair on the new base recovers. The
claims: repair with 10 % of the steps recovers 90 % of what training anew takes off the loss, on both bases, and 60 %
without labels, following the old base with its adapter; and `ga.predict_damage` ranks adapters x updates by the
measured rise of the loss (rank correlation of 0.7).

Every arm stores the same number of adapter parameters. A cell trains on one base: on the old one it is tested on both
(the second is direct transfer), on the new one it is re-tuned. The order of the cells is that of what decides; a killed
run goes on where it stopped; several processes may run side by side. Everything computes in fp32, so that machines
without fast bf16 agree.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import set_seed

import gatedadapters as ga
from benchmarks.common.command import carry_out, parser
from benchmarks.common.store import Result
from benchmarks.common.training import training_arguments
from benchmarks.studies.transfer.arms import BY_NAME
from benchmarks.studies.transfer.bases import Plain, build, premise, unlabelled
from benchmarks.studies.transfer.carry import run_carry
from benchmarks.studies.transfer.cells import SETTINGS, STORE, Cell, cells, read, shift_of
from benchmarks.studies.transfer.table import table
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset
from gatedadapters.data.bundled import load_task
from gatedadapters.reporting.versions import versions


def compute(cell: Cell) -> Result:
    """Train and score one cell."""
    setting = SETTINGS[cell.setting]
    task = load_task(cell.task, train=setting.train, validation=100, test=setting.test, seed=cell.seed)
    model, tokenizer = build(cell, getattr(setting, cell.base), task.n_classes)
    collate, data = MixedTaskCollator(tokenizer), MixedTaskDataset([task], tokenizer, "train", setting.length)
    batches = unlabelled(data, collate, 64)
    set_seed(cell.seed)
    options = BY_NAME[cell.arm](model, cell, batches)
    args = training_arguments(steps=setting.steps, batch=setting.batch, rate=setting.rate, seed=cell.seed)
    trainer = ga.GatedTrainer(model, args, train_dataset=data, data_collator=Plain(collate), **options)
    began = time.perf_counter()
    with ga.weaken_knowledge(model, mask=cell.mask, drop=cell.drop):  # exactly nothing where both are 0
        trainer.train()
    seconds = time.perf_counter() - began
    adapters = ga.get_adapters(model)
    structure = adapters.structure if adapters.bank is None else adapters.compact()
    test = MixedTaskDataset([task], tokenizer, "test", setting.length)
    result: dict[str, Any] = {cell.base: score(model, test, collate)}
    if cell.base == "old":
        with tempfile.TemporaryDirectory() as scratch:
            adapters.save(Path(scratch) / "adapter")
            new, _ = build(cell, setting.new, task.n_classes)
            ga.load_adapters(new, Path(scratch) / "adapter", base="updated")
        result["direct"] = score(new, test, collate)
    kinds = dict.fromkeys(path.site.sublayer for path in structure.paths)
    shares = {kind: sum(p.params for p in structure.paths if p.site.sublayer == kind) for kind in kinds}
    blocks = {p.site.block_index: 0 for p in structure.paths}
    for p in structure.paths:
        blocks[p.site.block_index] += p.params
    return {
        "cell": asdict(cell),
        **result,
        "params": structure.params,
        "params_by_sublayer": shares,
        "params_by_block": blocks,
        "seconds": round(seconds, 1),
        "total_seconds": round(time.perf_counter() - began, 1),
        "versions": versions(),
    }


@torch.no_grad()
def score(model: nn.Module, data: Any, collate: MixedTaskCollator, batch: int = 64) -> dict[str, float]:
    """Accuracy and mean cross-entropy; examples sorted by length, so that little is padding."""
    model.eval()
    order = sorted(range(len(data)), key=lambda i: len(data[i]["input_ids"]))
    right, loss, collate_plain, device = 0, 0.0, Plain(collate), next(model.parameters()).device
    for start in range(0, len(order), batch):
        inputs = {k: v.to(device) for k, v in collate_plain([data[i] for i in order[start : start + batch]]).items()}
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        right += int((logits.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    return {"accuracy": right / len(order), "loss": loss / len(order)}


def run_all(only: Sequence[str], limit: int | None) -> None:
    """Compute what is missing.

    Args:
        only: settings, tasks or arms; default: all.
        limit: at most so many cells.
    """
    computed = 0
    for cell in cells():
        if read(cell) is not None or (only and not {cell.setting, cell.task, cell.arm} & set(only)):
            continue
        if computed == limit:
            return
        computed += 1
        setting = SETTINGS[cell.setting]
        STORE.computed(shift_of(setting), partial(premise, setting, cell.task))
        result = compute(cell)
        STORE.write(cell.name, result)
        scores = {name: round(result[name]["accuracy"], 3) for name in ("old", "direct", "new") if name in result}
        print(f"{cell.name}: {scores}, {result['total_seconds']} s", flush=True)


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("transfer", __doc__, "carry", threads=1)
    made.add_argument(
        "--only",
        nargs="*",
        default=[],
        help="run: settings, tasks or arms, any of which a cell has, e.g. minilm gated. carry: all that a cell has, of "
        "settings, tasks, kinds, updates, arms and seeds, e.g. smollm2 small seed0 anew",
    )
    made.add_argument("--limit", type=int, help="at most so many cells")
    options = made.parse_args(arguments)
    if options.command == "carry":
        torch.set_num_threads(options.threads)
        run_carry(options.only, options.limit)
    carry_out(options, run=lambda: run_all(options.only, options.limit), table=table, pack=STORE.pack)
