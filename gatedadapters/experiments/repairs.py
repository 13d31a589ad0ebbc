"""The arms of a transfer that see the new base: repairs of the carried adapter, and trainings from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from gatedadapters.artifacts import load_adapters
from gatedadapters.data import collator
from gatedadapters.experiments.base_pair import BasePair, Measured
from gatedadapters.reporting.intervals import Interval
from gatedadapters.reporting.tables import format_table
from gatedadapters.transfer import Recovery, recovery
from gatedadapters.transfer.evaluate import as_before
from gatedadapters.transfer.repairing import repair

RATE = 0.1  # of a repair over that of a whole training, see `repair`
DIRECT, ANEW = "carried as it is", "trained anew"


@dataclass(frozen=True)
class RepairReport:
    """What repairing the carried adapter recovers on the new base, beside training anew.

    Attributes:
        arms: by arm, the scores of each seed, all on the new base.
    """

    arms: Mapping[str, tuple[Measured, ...]]

    def recovered(self, arm: str) -> Recovery:
        """The share of what training anew takes off the loss of direct transfer that this arm takes off."""
        direct, anew, own = ([m.loss for m in self.arms[name]] for name in (DIRECT, ANEW, arm))
        won = [d - o for d, o in zip(direct, own, strict=True)]
        return recovery(won, [d - a for d, a in zip(direct, anew, strict=True)])

    def table(self) -> str:
        """Mean scores with 95 % intervals, and the share of what training anew recovers."""
        rows = []
        for arm, scores in self.arms.items():
            right = [m.accuracy for m in scores if m.accuracy is not None]
            share = "" if arm in (DIRECT, ANEW) else str(self.recovered(arm)).partition(":")[0]
            shown = str(Interval.of(right)) if right else ""
            rows.append([arm, str(Interval.of([m.loss for m in scores])), shown, share])
        return format_table(["on the new base", "loss", "accuracy", "recovered"], rows)

    def to_data(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            arm: {"scores": [asdict(m) for m in scores], "recovered": asdict(self.recovered(arm))}
            for arm, scores in self.arms.items()
        }


def repair_arms(bases: BasePair, adapter: Path, seed: int, progress: tqdm[Any]) -> dict[str, Measured]:
    """Repair an adapter of the old base on the new one, with labels and without, and train anew with as few steps.

    Args:
        bases: both versions of the base, with nothing attached.
        adapter: the folder of the adapter.
        seed: of the order of batches.
        progress: a bar, which moves by one a step.
    """
    training, found = bases.config.training, dict[str, Measured]()
    for steps in lengths(bases.config.repair, training.steps):
        for labels in (True, False):
            arm = f"repaired, {steps} steps, {'labels' if labels else 'no labels'}"
            progress.set_description(arm)
            with as_before(bases.old), as_before(bases.new):
                load_adapters(bases.new, adapter, base="updated")
                if not labels:
                    load_adapters(bases.old, adapter)
                device = next(bases.new.parameters()).device
                with torch.autocast(device.type, torch.bfloat16, enabled=bases.runners[1].bf16):
                    repair(
                        bases.new,
                        _batches(bases, seed, labels=labels),
                        steps=steps,
                        teacher=None if labels else bases.old,
                        learning_rate=RATE * training.learning_rate,
                        seed=seed,
                        progress=False,
                    )
                progress.update(steps)
                found[arm] = bases.measure(bases.new)
        with as_before(bases.new):
            bases.train(bases.new, progress, steps=steps)
            found[f"trained anew, {steps} steps"] = bases.measure(bases.new)
    return found


def lengths(shares: Sequence[float], steps: int) -> list[int]:
    """The lengths of the repairs, in optimiser steps, each once."""
    return list(dict.fromkeys(max(1, round(share * steps)) for share in shares))


def _batches(bases: BasePair, seed: int, *, labels: bool) -> Iterator[dict[str, Any]]:
    """Shuffled training batches, without end."""
    size, generator = bases.config.training.batch_size, torch.Generator().manual_seed(seed)
    data: Any = bases.runners[0].train_data
    collate = collator(bases.tasks, bases.tokenizer)
    while True:
        for batch in DataLoader(data, size, shuffle=True, generator=generator, collate_fn=collate):
            yield batch if labels else {name: value for name, value in batch.items() if name != "labels"}
