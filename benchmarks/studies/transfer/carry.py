"""Adapters carried to an updated base: as they are, repaired, or trained anew; and what a prediction says before."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn
from transformers import set_seed

import gatedadapters as ga
from benchmarks.common.models import lora_space
from benchmarks.common.store import SCRATCH, Result, claimed
from benchmarks.common.training import training_arguments
from benchmarks.studies.placement.precision import autocast, precision
from benchmarks.studies.transfer.cells import STORE
from benchmarks.studies.transfer.problems import DECODER, ENCODER, PAIRS, Problem, Setting, problem
from gatedadapters.reporting.versions import versions
from gatedadapters.transfer import SiteDamage

SEEDS = (0, 1, 2)
CHOSEN_ON = ("newsgroups", "tweets")  # the formula of the prediction was chosen on LoRA adapters of these tasks
SHARES = (0.1, 0.25, 0.05)  # in the order of what decides
WEAKENED = {"plain": {}, "masking": {"mask": 0.1}, "dropping": {"drop": 0.1}, "both": {"mask": 0.1, "drop": 0.1}}
PROBED = 3  # unlabelled batches that a prediction reads
FORMULAS: dict[str, Callable[[Sequence[SiteDamage]], float]] = {
    "input moved": lambda sites: fmean(s.moved for s in sites),
    "contribution changed": lambda sites: fmean(s.changed for s in sites),
    "share x input moved, mean": lambda sites: fmean(s.share * s.moved for s in sites),
    "share x contribution changed, mean": lambda sites: fmean(s.share * s.changed for s in sites),
    "input moved, weighted by share": lambda sites: sum(s.share * s.moved for s in sites) / sum(s.share for s in sites),
}
SPACES: dict[str, ga.SearchSpace] = {
    "lora": lora_space(4),
    "attention": lora_space(8, sublayers=["attention"]),
    "feed_forward": lora_space(6, sublayers=["feed_forward"]),
}


@dataclass(frozen=True)
class CarryCell:
    """One arm for an adapter of one kind and one task, carried to one update.

    Attributes:
        arm: `direct`; `repaired`, `distilled` (repaired without labels) or `anew` with a share of the steps; or how
            knowledge was weakened in training.
    """

    setting: str
    task: str
    kind: str
    update: str
    seed: int
    arm: str

    @property
    def name(self) -> str:
        """Its name among the results."""
        return "_".join(map(str, astuple(self))).replace(" ", "_")


def arms() -> list[str]:
    """All arms, in the order of what decides."""
    few = [f"{what} {share:.0%}" for share in SHARES for what in ("repaired", "distilled", "anew")]
    return ["direct", "anew", *few, *(name for name in WEAKENED if name != "plain")]


def carry_cells() -> Iterator[CarryCell]:
    """Every cell, in the order of what decides."""
    pairs = [(ENCODER, task, "real") for task in ENCODER.tasks]
    pairs += [(DECODER, DECODER.tasks[0], update) for update in DECODER.updates]
    for seed in SEEDS:
        for setting, task, update in pairs:
            for arm in arms():
                yield CarryCell(setting.name, task, "lora", update, seed, arm)
    yield from damage_cells()


def damage_cells() -> Iterator[CarryCell]:
    """Adapters whose damage is predicted and measured: every kind, task and update, one seed."""
    for setting in (PAIRS, DECODER):
        for kind in SPACES:
            for task in setting.tasks:
                for update in setting.updates:
                    yield CarryCell(setting.name, task, kind, update, 0, "direct")


def compute(cell: CarryCell) -> Result:
    """Measure one arm on the new base; direct transfer and weakened training also on the old one."""
    setting = {s.name: s for s in (ENCODER, PAIRS, DECODER)}[cell.setting]
    given, began = problem(setting, cell.task, cell.seed), time.process_time()
    what, _, share = cell.arm.partition(" ")
    steps = round(float(share.rstrip("%")) / 100 * setting.steps) if share else setting.steps
    result: dict[str, Any] = {"cell": asdict(cell)}
    if what == "anew":
        result["new"] = given.score(trained(setting, given, cell, cell.update, "plain", steps))
    else:
        old, folder, result["old"] = trained_before(setting, given, cell, what if what in WEAKENED else "plain")
        new = given.build(cell.update)
        ga.load_adapters(new, folder, base="updated")
        if what == "direct":
            probe = given.batches(cell.seed, setting.probe, labels=False)
            result["damage"] = predicted(old, new, list(islice(probe, PROBED)))
        if what in ("repaired", "distilled"):
            batches = given.batches(cell.seed + 100, setting.batch, labels=what == "repaired")
            teacher = old if what == "distilled" else None
            with autocast():
                ga.repair(new, batches, steps=steps, teacher=teacher, seed=cell.seed, progress=False)
        result["new"] = given.score(new)
    result["cpu_seconds"] = round(time.process_time() - began, 1)
    return {**result, "precision": precision(), "versions": versions()}


def trained_before(
    setting: Setting, given: Problem, cell: CarryCell, weakening: str
) -> tuple[nn.Module, Path, dict[str, float]]:
    """The old base with adapters trained on it, the folder where they are kept, and their scores there."""
    name = "_".join((setting.name, cell.task, cell.kind, weakening, str(cell.seed)))
    folder = SCRATCH / "transfer" / name
    if not folder.is_dir():
        model = trained(setting, given, cell, "old", weakening, setting.steps)
        ga.get_adapters(model).save(folder)
    model = given.build("old")
    ga.load_adapters(model, folder)
    return model, folder, STORE.computed(f"old_{name}", lambda: given.score(model))


def trained(setting: Setting, given: Problem, cell: CarryCell, base: str, weakening: str, steps: int) -> nn.Module:
    """A base with adapters trained on it, compact."""
    model = given.build(base)
    candidates = ga.attach(model, SPACES[cell.kind], seed=cell.seed)
    structure = candidates.discretize(scores=torch.ones_like(candidates.bank.kept))
    ga.detach(model)
    ga.attach(model, structure, seed=cell.seed)
    set_seed(cell.seed)
    args = training_arguments(
        steps=steps, batch=setting.batch, rate=setting.rate, seed=cell.seed, bf16=precision() == "bf16"
    )
    trainer = ga.GatedTrainer(model, args, train_dataset=given.items, data_collator=given.collate)
    with ga.weaken_knowledge(model, **{"mask": 0.0, "drop": 0.0, **WEAKENED[weakening]}):
        trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # it wraps `forward` in autocast
    return model


def predicted(old: nn.Module, new: nn.Module, batches: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the library predicts, and what other formulas would say of the same sites."""
    found = ga.predict_damage(old, new, batches)
    return {
        "predicted": found.value,
        "outputs moved": found.outputs,
        **{name: formula(found.sites) for name, formula in FORMULAS.items()},
    }


def run_carry(only: Sequence[str], limit: int | None) -> None:
    """Compute what is missing; several processes share the work.

    Args:
        only: settings, tasks, kinds, updates, arms or seeds: cells that have all of these are computed; default: all.
        limit: at most so many cells.
    """
    computed = 0
    for cell in carry_cells():
        about = {cell.setting, cell.task, cell.kind, cell.update, f"seed{cell.seed}", cell.arm}
        if STORE.read(cell.name) is not None or not set(only) <= about:
            continue
        with claimed(STORE.loose / f"{cell.name}.lock") as mine:
            if not mine:
                continue
            if computed == limit:
                return
            computed += 1
            result = compute(cell)
            STORE.write(cell.name, result)
        print(f"{cell.name}: loss {result['new']['loss']:.3f}, {result['cpu_seconds']} s", flush=True)
