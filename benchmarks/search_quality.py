"""Does a searched structure beat a guessed one of the same size?

Claim under test: at equal parameter count and equal training steps, the structure that one gated run finds scores above
a random structure and no worse than uniform rank, attention-only LoRA, or dense training truncated by SVD; every arm
with its own learning rate, tuned on validation data; scores on test data, after pruning.

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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import computed, shown
from peft_rivals import BATCH, PEFT_ARMS, peft_ranks
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import gatedadapters as ga
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset
from gatedadapters.data.bundled import load_encoder, load_task
from gatedadapters.reporting.versions import versions

STORE = Path(__file__).parent / "results" / "search_quality"
MAX_LENGTH, TEST = 32, 1000
SCHEDULE = ga.Schedule(warmup=0.02, ramp=0.08, prune=0.1)


@dataclass(frozen=True)
class Cell:
    """One training run: everything its result depends on."""

    task: str
    budget: float
    arm: str
    rate: float
    seed: int
    steps: int = 240
    model: str = "minilm-l3"
    train: int = 6000
    split: str = "test"

    @property
    def file(self) -> Path:
        """Where its result is stored."""
        fields = (
            self.model,
            self.task,
            f"{self.budget:.5f}",
            self.arm,
            f"{self.rate:g}",
            self.steps,
            self.split,
            self.seed,
        )
        return STORE / ("_".join(map(str, fields)) + ".json")


# -- arms --------------------------------------------------------------------------------------------------------------


def searched(model: nn.Module, cell: Cell) -> dict[str, Any]:
    """One gated run: warm-up, ramp, prune, fine-tune the survivors."""
    ga.attach(model, "lora-all-linear", seed=cell.seed)
    return {"budget": ga.Budget(fraction=cell.budget), "schedule": SCHEDULE}


def searched_mixed(model: nn.Module, cell: Cell) -> dict[str, Any]:
    """The same search over every path kind, to the same number of parameters."""
    size = _size(model, cell)
    ga.attach(model, _mixed(), seed=cell.seed)
    return {"budget": ga.Budget(params=size), "schedule": SCHEDULE}


def random_mixed(model: nn.Module, cell: Cell) -> dict[str, Any]:
    """A random structure of every path kind, of the same size."""
    return _fixed(model, cell, _mixed(), lambda bank: torch.rand(bank.kept.shape, generator=_generator(cell)))


def _mixed() -> ga.SearchSpace:
    return ga.SearchSpace.load("encoder-mixed").with_gates(levels=("rank",))


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
    """Dense training for 65 % of the steps, cut to the budget by singular values, then fine-tuned."""
    _all_open(model, cell)
    return {"gate_learning_rate": 1e-30, "callbacks": [TruncateBySVD(ga.Budget(fraction=cell.budget), at=0.65)]}


def dense(model: nn.Module, cell: Cell) -> dict[str, Any]:
    """All candidates, nothing pruned: what the others are compressed from."""
    _all_open(model, cell)
    return {"gate_learning_rate": 1e-30, "callbacks": [TruncateBySVD(ga.Budget(fraction=1.0), at=2.0)]}


def _all_open(model: nn.Module, cell: Cell) -> None:
    space = ga.SearchSpace.load("lora-all-linear").with_gates(stochastic=False, init_spread=0.0)
    ga.attach(model, space, seed=cell.seed)


class TruncateBySVD(TrainerCallback):
    """Rotates every path's ranks into singular directions and keeps the largest singular values that fit.

    Until then paths learn at the share of the rate that the budget is of them, as the search does: the rate is that of
    what is kept, so that one rate can be tuned for both parts.
    """

    def __init__(self, budget: ga.Budget, at: float) -> None:
        self.budget, self.at = budget, at

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, lr_scheduler: Any, **kwargs: Any
    ) -> None:
        """Lower the rate of the dense part."""
        paths, until = {id(p) for p in ga.get_adapters(model).weight_parameters()}, self.at * state.max_steps

        def lowered(factor: Callable[[int], float]) -> Callable[[int], float]:
            return lambda step: factor(step) * (self.budget.fraction if step < until else 1.0)

        for index, group in enumerate(optimizer.param_groups):
            if id(group["params"][0]) in paths:
                lr_scheduler.lr_lambdas[index] = lowered(lr_scheduler.lr_lambdas[index])

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


def _fixed(
    model: nn.Module, cell: Cell, space: str | ga.SearchSpace, scores: Callable[[Any], Tensor]
) -> dict[str, Any]:
    """Attach the structure of the cell's size that takes the candidates with the highest scores."""
    budget = ga.Budget(params=_size(model, cell))
    candidates = ga.attach(model, space, seed=cell.seed)
    structure = candidates.discretize(budget, scores=scores(candidates.bank))
    ga.detach(model)
    ga.attach(model, structure, seed=cell.seed)
    return {}


def _size(model: nn.Module, cell: Cell) -> int:
    """Parameters of every arm: a share of LoRA rank 8 at every linear map."""
    dense = ga.attach(model, "lora-all-linear").bank.dense_cost()
    ga.detach(model)
    return int(dense * cell.budget)


def _evenly(bank: Any) -> Tensor:
    """Scores that fill rank by rank, and within a rank spread over the maps."""
    order = {key: i for i, key in enumerate(bank.slices)}
    scores = torch.zeros_like(bank.kept)
    for key, where in bank.slices.items():
        spread = (order[key] * 0.6180339887) % 1.0  # a low-discrepancy order, so that any prefix is spread evenly
        scores[:, where] = 2.0 - torch.arange(where.stop - where.start) - 0.5 * spread
    return scores - scores.min() + 1


def _generator(cell: Cell) -> torch.Generator:
    return torch.Generator().manual_seed(7919 * cell.seed + 17)


ARMS: dict[str, Callable[[nn.Module, Cell], dict[str, Any]]] = {
    "searched": searched,
    "dense": dense,
    "random": random_structure,
    "uniform": uniform,
    "attention": attention_only,
    "svd": svd,
    "searched-mixed": searched_mixed,
    "random-mixed": random_mixed,
}


# -- one cell ----------------------------------------------------------------------------------------------------------


def compute(cell: Cell, arm: Callable[[nn.Module, Cell], dict[str, Any]]) -> dict[str, Any]:
    """Train and score one cell."""
    set_seed(cell.seed)
    backbone, tokenizer = load_encoder(cell.model)
    task = load_task(cell.task, train=cell.train, validation=1000, test=TEST, seed=cell.seed)
    set_seed(cell.seed)
    model = ga.MultiTaskClassifier(backbone, {task.name: task.n_classes})
    collate = MixedTaskCollator(tokenizer)
    data = MixedTaskDataset([task], tokenizer, "train", MAX_LENGTH)
    options = arm(model, cell, data, collate) if arm in PEFT_ARMS.values() else arm(model, cell)
    args = TrainingArguments(
        output_dir=str(STORE / ".scratch" / str(os.getpid())),
        max_steps=cell.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=cell.rate,
        warmup_steps=round(0.06 * cell.steps),
        weight_decay=0.0,
        seed=cell.seed,
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        save_strategy="no",
        logging_steps=cell.steps,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer_class = Trainer if arm in PEFT_ARMS.values() else ga.GatedTrainer
    trainer = trainer_class(model, args, train_dataset=data, data_collator=collate, **options)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    shape = peft_ranks(model) if arm in PEFT_ARMS.values() else compacted(model)
    score = accuracy(model, MixedTaskDataset([task], tokenizer, cell.split, MAX_LENGTH), collate)
    return {
        "cell": asdict(cell),
        "score": score,
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


@torch.no_grad()
def accuracy(model: nn.Module, dataset: Any, collate: Any, batch: int = 64) -> float:
    """Share of examples whose class is found; examples sorted by length, so that little is padding."""
    model.eval()
    order = sorted(range(len(dataset)), key=lambda i: len(dataset[i]["input_ids"]))
    right = 0
    for start in range(0, len(order), batch):
        inputs = collate([dataset[i] for i in order[start : start + batch]])
        labels = inputs.pop("labels")
        right += int((model(**inputs).logits.argmax(-1) == labels).sum())
    return right / len(order)


# -- the study ---------------------------------------------------------------------------------------------------------

RATES = (5e-3, 1e-2, 2e-2)
DENSE_RATES = (6e-4, 1.2e-3, 2.5e-3)  # eight times the ranks
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEED = 100
LORA = ("searched", "random", "uniform", "attention", "svd")


@dataclass(frozen=True)
class Study:
    """Arms compared on one task at one budget, each with the rate that was best for it on validation data.

    Rates are tuned on this task at this budget, or carried over from another study for the arms that were tuned there.
    """

    task: str
    budget: float
    arms: tuple[str, ...]
    rates_of: Study | None = None

    def rate(self, arm: str, *, compute_missing: bool = False) -> float | None:
        """The arm's tuned rate; None where a cell that decides it is missing."""
        if self.rates_of is not None and arm in self.rates_of.arms:
            return self.rates_of.rate(arm, compute_missing=compute_missing)
        return tuned_rate(self.task, self.budget, arm, compute_missing=compute_missing)


FIRST = Study("tweets", 1 / 8, (*LORA, "adalora", "eva"))
STUDIES = (
    FIRST,
    Study("newsgroups", 1 / 8, LORA, FIRST),
    Study("rotten_tomatoes", 1 / 8, LORA, FIRST),
    Study("tweets", 1 / 32, (*LORA, "searched-mixed", "random-mixed"), FIRST),
    Study("tweets", 1 / 128, ("searched", "random", "uniform", "attention"), FIRST),
    Study("tweets", 1.0, ("dense",)),
)


def run(cell: Cell) -> dict[str, Any]:
    """The stored result of a cell, computed now if nobody has; written whole or not at all."""
    return computed(cell.file, lambda: compute(cell, {**ARMS, **PEFT_ARMS}[cell.arm]))


def tuned_rate(task: str, budget: float, arm: str, *, compute_missing: bool) -> float | None:
    """The learning rate with the best validation score, from a seed that the comparison does not use."""
    scores = {}
    rates = DENSE_RATES if arm == "dense" else RATES
    for rate in rates:
        cell = Cell(task, budget, arm, rate, TUNING_SEED, split="validation")
        if compute_missing or cell.file.exists():
            scores[rate] = run(cell)["score"]
    return max(scores, key=lambda rate: scores[rate]) if len(scores) == len(rates) else None


def run_all(only: list[str], seeds: Sequence[int], arms: Sequence[str]) -> None:
    """Compute what is missing: for each study, tune each arm, then seed by seed so that pairs are complete early."""
    for study in STUDIES:
        name = f"{study.task}:{study.budget:g}"
        if only and name not in only and study.task not in only:
            continue
        rates = {arm: study.rate(arm, compute_missing=True) for arm in study.arms if arm in arms}
        for seed in seeds:  # seed by seed, so that pairs are complete early
            for arm, rate in rates.items():
                assert rate is not None
                result = run(Cell(study.task, study.budget, arm, rate, seed))
                print(f"{name} {arm} seed {seed} rate {rate:g}: {result['score']:.3f}", flush=True)


Found = dict[str, dict[int, dict[str, Any]]]  # results by arm and seed


def stored(study: Study) -> tuple[dict[str, float], Found]:
    """Tuned rates and test results of one study, as far as its cells are there."""
    rates = {arm: rate for arm in study.arms if (rate := study.rate(arm)) is not None}
    found: Found = {}
    for arm, rate in rates.items():
        cells = [Cell(study.task, study.budget, arm, rate, seed) for seed in SEEDS]
        found[arm] = {cell.seed: json.loads(cell.file.read_text()) for cell in cells if cell.file.exists()}
    return rates, found


def table() -> str:
    """Every study from the stored cells: mean test accuracy, and searched minus each arm with its 95 % interval."""
    lines = [
        "| task | budget | arm | rate | seeds | accuracy | searched - arm (95 %) | parameters |",
        "|---|---|---|---|---|---|---|---|",
    ]
    pooled: dict[str, dict[tuple[str, int], list[float]]] = {arm: {} for arm in (*ARMS, *PEFT_ARMS)}
    for study in STUDIES:
        rates, found = stored(study)
        for arm, results in found.items():
            if not results:
                continue
            differences = paired(found, arm)
            for seed, difference in differences.items():
                pooled[arm].setdefault((study.task, seed), []).append(difference)
            versus = "" if arm == "searched" else shown(differences.values(), signed=True)
            size = max((r["params"] for r in results.values()), default=0)
            place = f"| {study.task} | 1/{1 / study.budget:g} | {arm} | {rates[arm]:g} | {len(results)} "
            lines.append(f"{place}| {mean_score(results):.1f} | {versus} | {size:,} |")
        mixed = paired(found, "random-mixed", ours="searched-mixed")
        if mixed:
            place = f"| {study.task} | 1/{1 / study.budget:g} | searched-mixed - random-mixed | | {len(mixed)} "
            lines.append(f"{place}| | {shown(mixed.values(), signed=True)} | |")
    for arm, pairs in pooled.items():
        if arm != "searched" and len(pairs) > 1:
            means = [float(np.mean(found)) for found in pairs.values()]  # budgets of one seed share data and heads
            lines.append(f"| all | | {arm} | | {len(pairs)} pairs | | {shown(means, signed=True)} | |")
    return "\n".join(lines)


def paired(found: Found, arm: str, *, ours: str = "searched") -> dict[int, float]:
    """`ours` minus `arm` in test accuracy, by seed, for the seeds that both have."""
    mine, others = found.get(ours, {}), found.get(arm, {})
    return {seed: mine[seed]["score"] - others[seed]["score"] for seed in sorted(mine.keys() & others.keys())}


def mean_score(results: dict[int, dict[str, Any]]) -> float:
    """Mean test accuracy in per cent."""
    return 100 * float(np.mean([r["score"] for r in results.values()])) if results else float("nan")


def compression() -> str:
    """For each arm, the accuracy at every budget and the smallest budget within a point of the dense candidates."""
    whole = next((study for study in STUDIES if study.budget == 1), None)
    if whole is None:
        return ""
    found = {study.budget: stored(study)[1] for study in STUDIES if study.task == whole.task}
    dense_results = found.pop(1.0).get("dense", {})
    if not dense_results:
        return ""
    target = mean_score(dense_results) - 1
    budgets = sorted((budget for budget, results in found.items() if results.get("searched")), reverse=True)
    lines = [
        f"| {whole.task} | " + " | ".join(f"1/{1 / budget:g}" for budget in budgets) + " | smallest within 1 point |",
        "|---|" + "---|" * (len(budgets) + 1),
        f"| dense: {target + 1:.1f} |" + " |" * (len(budgets) + 1),
    ]
    for arm in LORA:
        scores = {budget: mean_score(found[budget].get(arm, {})) for budget in budgets}
        near = [budget for budget, score in scores.items() if score >= target]
        cells = " | ".join(f"{score:.1f}" for score in scores.values())
        lines.append(f"| {arm} | {cells} | {f'1/{1 / min(near):g}' if near else 'none'} |")
    return "\n".join(lines)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--only", nargs="*", default=[], help="studies, e.g. newsgroups:0.125 or tweets")
    parser.add_argument("--arms", nargs="*", choices=(*ARMS, *PEFT_ARMS), default=(*ARMS, *PEFT_ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS, help="to share the work out between processes")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.command == "run":
        run_all(options.only, options.seeds, options.arms)
    print(table(), compression(), sep="\n\n")


if __name__ == "__main__":
    sys.exit(main())
