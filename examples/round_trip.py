"""Search a structure on a real model, hand it to peft, and see peft compute the same; then merge it and take it back.

python examples/round_trip.py OUT     (a new folder; needs peft and the packages of benchmarks/requirements.txt)
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import TrainingArguments, default_data_collator

import gatedadapters as ga
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset
from gatedadapters.data.bundled import load_encoder, load_smollm2, load_task


@dataclass(frozen=True)
class Case:
    """A pretrained model, data to search on, and a batch to compare on."""

    build: Callable[[], nn.Module]  # the same weights at every call
    data: Any
    collate: Callable[[Any], dict[str, Tensor]]
    batch: dict[str, Tensor]


def minilm() -> Case:
    """MiniLM-L6 (BERT) under a classification head, on film reviews."""
    task = load_task("rotten_tomatoes", train=64, validation=8, test=8)
    _, tokenizer = load_encoder("minilm-l6")

    def build() -> nn.Module:
        torch.manual_seed(0)
        return ga.MultiTaskClassifier(load_encoder("minilm-l6")[0], {task.name: task.n_classes}).eval()

    batch = dict(tokenizer(task.test.texts, padding=True, return_tensors="pt"))
    return Case(build, MixedTaskDataset([task], tokenizer, max_length=32), MixedTaskCollator(tokenizer), batch)


def smollm2() -> Case:
    """SmolLM2-135M (Llama) with its language-modelling head, on the same reviews as running text."""
    task = load_task("rotten_tomatoes", train=64, validation=8, test=8)
    _, tokenizer = load_smollm2()
    ids = tokenizer(" ".join(task.train.texts))["input_ids"]
    rows = [ids[start : start + 32] for start in range(0, len(ids) - 32, 32)]
    batch = {"input_ids": torch.tensor(rows[:2])}
    return Case(lambda: load_smollm2()[0], [{"input_ids": r, "labels": r} for r in rows], default_data_collator, batch)


CASES = {"minilm-l6": minilm, "smollm2": smollm2}


def search(model: nn.Module, case: Case, steps: int) -> ga.Adapters:
    """LoRA at every linear map, cut to a fifth of its parameters in one short run; what is left differs in rank."""
    adapters = ga.attach(model, "lora-all-linear", case.batch)
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=2e-3,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = ga.GatedTrainer(
            model, args, train_dataset=case.data, data_collator=case.collate, budget=ga.Budget(fraction=0.2)
        )
        trainer.train()
    adapters.compact()
    return adapters


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """What a model in evaluation mode makes of a batch, on the CPU."""
    device = next(model.parameters()).device
    found: Tensor = model.eval()(**{name: value.to(device) for name, value in batch.items()}).logits
    return found.float().cpu()


def round_trip(name: str, out: Path, steps: int) -> dict[str, float]:
    """Search, export, load with peft, merge, unmerge; the largest change of a logit at each of these steps.

    All as shares of the largest logit: float32 ends at about 1e-6 of it in a model of thirty layers.
    """
    case = CASES[name]()
    model = case.build()
    untouched = logits(model, case.batch)
    scale = untouched.abs().max()

    adapters = search(model, case, steps)
    ours = logits(model, case.batch)
    print(f"{name}\n{adapters.structure}\n")

    ga.export_peft(adapters, out / name)
    theirs = logits(peft.PeftModel.from_pretrained(case.build(), str(out / name)), case.batch)

    adapters.merge()
    merged = logits(model, case.batch)
    adapters.unmerge()
    restored = logits(model, case.batch)

    steps_of_the_trip = {
        "moved": ours - untouched,
        "peft": theirs - ours,
        "merged": merged - ours,
        "unmerged": restored - ours,
    }
    return {step: float(difference.abs().max() / scale) for step, difference in steps_of_the_trip.items()}


def main(out: str, names: Sequence[str] = tuple(CASES), steps: int = 20) -> dict[str, dict[str, float]]:
    """The round trip of every model named."""
    found = {name: round_trip(name, Path(out), steps) for name in names}
    for name, differences in found.items():
        print(f"{name}: logits moved by up to {differences['moved']:.1g}; from there, peft's differ by ", end="")
        print(f"{differences['peft']:.1g}, merged ones by {differences['merged']:.1g}, unmerged by", end=" ")
        print(f"{differences['unmerged']:.1g}")
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
