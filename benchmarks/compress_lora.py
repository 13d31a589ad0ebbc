"""Does a gated search make an existing LoRA smaller at less loss than truncating it by singular values?

Claim under test: a LoRA of rank 8 at every linear map, trained with peft on a real task, keeps more test accuracy when
`import_peft`, gates and a budget cut it to 1/4 or 1/8 of its parameters than after plain truncation (the largest
singular values of all modules, no training), and no less than after truncation and as many steps of fine-tuning as the
gated run takes in all. A random choice of ranks, fine-tuned likewise, is the control. Learning rates of the trained
arms are chosen on validation data with another seed; scores on test data, at the final size.

    python benchmarks/compress_lora.py run       # computes the cells that are missing, one JSON file each
    python benchmarks/compress_lora.py table     # prints the tables from the stored cells

A killed run goes on where it stopped. Everything computes in fp32, so that machines without fast bf16 agree.
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
from cells import computed, interval
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

import gatedadapters as ga
from gatedadapters.artifacts import singular_values
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset, TextTask
from gatedadapters.data.bundled import load_encoder, load_task
from gatedadapters.experiments.evaluation import evaluate
from gatedadapters.reporting.versions import versions

RESULTS = Path(__file__).parent / "results"
STORE, SCRATCH = RESULTS / "compress_lora", RESULTS / "tmp" / "compress_lora"
MODEL, BATCH, MAX_LENGTH, TRAIN, TEST, RANK = "minilm-l3", 16, 40, 1000, 1000, 8
LORA_STEPS, LORA_RATE, STEPS = 200, 3e-3, 60
TASKS, SHARES = ("newsgroups", "rotten_tomatoes"), (1 / 4, 1 / 8)
RATES = (1e-3, 4e-3)
SEEDS, TUNING_SEED = (0, 1, 2, 3, 4), 100
START = ga.Schedule(warmup=0.0, ramp=0.2, prune=0.25)  # what is imported means something from the first step


@dataclass(frozen=True)
class Cell:
    """One way of making one LoRA smaller: everything its result depends on. `share` 1 is the LoRA itself."""

    task: str
    arm: str
    share: float
    seed: int
    rate: float = 0.0
    split: str = "test"

    @property
    def file(self) -> Path:
        """Where its result is stored."""
        fields = (MODEL, self.task, f"{self.share:.5f}", self.arm, f"{self.rate:g}", self.split, self.seed)
        return STORE / ("_".join(map(str, fields)) + ".json")


# -- the LoRA ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A task's data and what builds the classifier that its LoRA belongs to."""

    task: TextTask
    tokenizer: Any
    build: Callable[[], nn.Module]

    def fit(
        self, trainer_class: type[Trainer], model: nn.Module, rate: float, steps: int, seed: int, **more: Any
    ) -> None:
        """Train `model` on the task."""
        args = TrainingArguments(
            output_dir=str(SCRATCH / "trainer" / str(os.getpid())),
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            warmup_steps=round(0.06 * steps),
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            save_strategy="no",
            logging_steps=steps,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        data = MixedTaskDataset([self.task], self.tokenizer, "train", MAX_LENGTH)
        trainer_class(model, args, train_dataset=data, data_collator=MixedTaskCollator(self.tokenizer), **more).train()

    def accuracy(self, model: nn.Module, split: str) -> float:
        """Share of examples whose class is found."""
        return evaluate(model, [self.task], self.tokenizer, MAX_LENGTH, split=split)[self.task.name]


def bench(name: str, seed: int) -> Bench:
    """Data and model depend on the task and the seed alone."""
    task = load_task(name, train=TRAIN, validation=1000, test=TEST, seed=seed)
    _, tokenizer = load_encoder(MODEL)

    def build() -> nn.Module:
        set_seed(seed)
        return ga.MultiTaskClassifier(load_encoder(MODEL)[0], {task.name: task.n_classes})

    return Bench(task, tokenizer, build)


def trained_lora(on: Bench, seed: int) -> Path:
    """The folder of a LoRA that peft trained and saved, head included; made at first use."""
    folder = SCRATCH / f"{on.task.name}_{seed}"
    if not (folder / "adapter_model.safetensors").exists():
        model = on.build()
        (head,) = model.heads
        maps = [linear.name for _, _, linear in ga.discover(model).maps()]
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=maps, modules_to_save=[f"heads.{head}"])
        model = get_peft_model(model, config)
        on.fit(Trainer, model, LORA_RATE, LORA_STEPS, seed)
        part = folder.with_name(f"{folder.name}.{os.getpid()}")
        model.save_pretrained(part)
        os.replace(part, folder)
    return folder


# -- arms --------------------------------------------------------------------------------------------------------------


def whole(on: Bench, model: nn.Module, adapters: ga.Adapters, cell: Cell) -> None:
    """The LoRA as it is."""
    adapters.compact()


def svd(on: Bench, model: nn.Module, adapters: ga.Adapters, cell: Cell) -> None:
    """The largest singular values of all modules that fit, and no training."""
    adapters.compact(adapters.discretize(_budget(adapters, cell), scores=singular_values(adapters)))


def svd_tuned(on: Bench, model: nn.Module, adapters: ga.Adapters, cell: Cell) -> None:
    """The same, then fine-tuned for as many steps as the gated run takes."""
    svd(on, model, adapters, cell)
    on.fit(ga.GatedTrainer, model, cell.rate, STEPS, cell.seed)


def random_tuned(on: Bench, model: nn.Module, adapters: ga.Adapters, cell: Cell) -> None:
    """Ranks by chance, each module's best approximation of that rank, then fine-tuned."""
    generator = torch.Generator().manual_seed(7919 * cell.seed + 17)
    scores = torch.rand(adapters.bank.kept.shape, generator=generator)
    adapters.compact(adapters.discretize(_budget(adapters, cell), scores=scores))
    on.fit(ga.GatedTrainer, model, cell.rate, STEPS, cell.seed)


def gated(on: Bench, model: nn.Module, adapters: ga.Adapters, cell: Cell) -> None:
    """Gates under the budget for a quarter of the steps, the survivors fine-tuned for the rest."""
    on.fit(ga.GatedTrainer, model, cell.rate, STEPS, cell.seed, budget=_budget(adapters, cell), schedule=START)
    adapters.compact()


def _budget(adapters: ga.Adapters, cell: Cell) -> ga.Budget:
    return ga.Budget(params=int(adapters.bank.dense_cost() * cell.share))


ARMS: dict[str, Callable[..., None]] = {
    "whole": whole,
    "svd": svd,
    "svd-tuned": svd_tuned,
    "random-tuned": random_tuned,
    "gated": gated,
}
TUNED = ("svd-tuned", "gated")  # chooses its rate; random-tuned takes that of svd-tuned


def compute(cell: Cell) -> dict[str, Any]:
    """Make one LoRA smaller, and score it."""
    on = bench(cell.task, cell.seed)
    folder = trained_lora(on, cell.seed)
    model = on.build()
    began, spent = time.perf_counter(), time.process_time()
    adapters = ga.import_peft(model, folder, seed=cell.seed)
    ARMS[cell.arm](on, model, adapters, cell)
    return {
        "cell": asdict(cell),
        "score": on.accuracy(model, cell.split),
        "params": adapters.structure.params,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - spent, 1),
        "structure": {record.key: len(record.kept) for record in adapters.structure.paths},
        "versions": versions(),
    }


# -- the study ---------------------------------------------------------------------------------------------------------


def run(cell: Cell) -> dict[str, Any]:
    """The stored result of a cell, computed now if nobody has; written whole or not at all."""
    return computed(cell.file, lambda: compute(cell))


def tuned_rate(task: str, arm: str, *, compute_missing: bool) -> float | None:
    """The rate with the best validation score at the smaller size, from a seed that the comparison does not use."""
    scores = {}
    for rate in RATES:
        cell = Cell(task, "svd-tuned" if arm == "random-tuned" else arm, min(SHARES), TUNING_SEED, rate, "validation")
        if compute_missing or cell.file.exists():
            scores[rate] = run(cell)["score"]
    return max(scores, key=lambda rate: scores[rate]) if len(scores) == len(RATES) else None


def study(task: str, *, compute_missing: bool) -> list[Cell]:
    """Every cell of a task, seed by seed so that pairs are complete early."""
    tuned = {arm: tuned_rate(task, arm, compute_missing=compute_missing) for arm in TUNED}
    rates = {"svd": 0.0, **tuned, "random-tuned": tuned["svd-tuned"]}
    cells = []
    for seed in SEEDS:
        cells.append(Cell(task, "whole", 1.0, seed))
        cells += [
            Cell(task, arm, share, seed, rate) for share in SHARES for arm, rate in rates.items() if rate is not None
        ]
    return cells


def run_all() -> None:
    """Compute what is missing, task by task."""
    for task in TASKS:
        for cell in study(task, compute_missing=True):
            result = run(cell)
            print(f"{cell.task} 1/{1 / cell.share:g} {cell.arm} seed {cell.seed}: {result['score']:.3f}", flush=True)


def table() -> str:
    """Mean test accuracy of each arm, and gated minus the arm with its 95 % interval, from the stored cells."""
    lines = [
        "| task | size | arm | rate | seeds | accuracy | gated - arm (95 %) | parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    pooled: dict[str, list[float]] = {}
    for task in TASKS:
        found: dict[tuple[float, str], dict[int, dict[str, Any]]] = {}
        rates: dict[str, float] = {}
        for cell in study(task, compute_missing=False):
            if cell.file.exists():
                found.setdefault((cell.share, cell.arm), {})[cell.seed] = json.loads(cell.file.read_text())
                rates[cell.arm] = cell.rate
        for share, arm in sorted(found, key=lambda key: (-key[0], list(ARMS).index(key[1]))):
            results, ours = found[share, arm], found.get((share, "gated"), {})
            pairs = sorted(set(results) & set(ours)) if arm != "gated" else []
            differences = [ours[s]["score"] - results[s]["score"] for s in pairs]
            pooled.setdefault(arm, []).extend(differences)
            mean, half = interval(np.array(differences)) if pairs else (float("nan"), float("nan"))
            versus = f"{100 * mean:+.1f} ± {100 * half:.1f}" if len(pairs) > 1 else ""
            score = 100 * np.mean([result["score"] for result in results.values()])
            size = max(result["params"] for result in results.values())
            rate = f"{rates[arm]:g}" if rates[arm] else ""
            lines.append(
                f"| {task} | 1/{1 / share:g} | {arm} | {rate} | {len(results)} | {score:.1f} | {versus} | {size:,} |"
            )
    for arm, differences in pooled.items():
        if len(differences) > 1:
            mean, half = interval(np.array(differences))
            lines.append(f"| all | | {arm} | | {len(differences)} pairs | | {100 * mean:+.1f} ± {100 * half:.1f} | |")
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.command == "run":
        run_all()
    print(table())


if __name__ == "__main__":
    sys.exit(main())
