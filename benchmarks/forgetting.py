"""What does a model forget while it learns a domain, and does a mask protect it?

Claims under test, at equal optimiser steps and with each arm's learning rate tuned on validation data, by the mean of
domain and general score, which is what an arm trades: tuning the elements that matter least in general loses less
general ability than a random mask of equal size; its domain score is no worse than LoRA's of equal size; and gates with
a mask under one budget do better than either alone. EWC's weight is not tuned.

    python benchmarks/forgetting.py run [--studies grimm ...] [--arms zero full ...] [--seeds 0 1] [--core 0.95]
    python benchmarks/forgetting.py table
    python benchmarks/forgetting.py picture forgetting.png

Decoder studies (SmolLM2-135M-Instruct): `grimm` and `friends` learn running text, `openbookqa`, `medmcqa` and `piqa`
learn answers to science, medical and physical questions (scored by the loss of the right answer and, as the domain's
task, by accuracy); general ability is the loss on held-out news (XSum) and the accuracy on a held-out task
(CommonsenseQA). Encoder study (MiniLM-L3): `encoder` first learns newsgroups in full, which
is then what it must not lose while it learns sentiment. Every score is on test data, an interval over seeds where there
are several. Every cell is stored as it finishes; a killed run goes on where it stopped. Everything computes in fp32, so
that machines without fast bf16 agree.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cells import computed, shown
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trade_off import trade_off

import gatedadapters as ga
from gatedadapters.data import ChoiceExample, MixedTaskCollator, MixedTaskDataset
from gatedadapters.data.bundled import load_choices, load_corpus, load_encoder, load_smollm2, load_task
from gatedadapters.data.language import LanguageCollator, LanguageDataset, Passage, split_passages
from gatedadapters.masking.scores.losses import task_losses
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Path(__file__).parent / "results" / "forgetting"
BATCH, LENGTH = 8, 40
DECODER_BATCH, DECODER_LENGTH = 4, 64
RATES = {  # of the encoder, of a decoder
    "full": ((3e-5, 1e-4, 3e-4), (1e-5, 1e-4)),
    "others": ((6e-4, 2e-3, 6e-3), (2e-4, 2e-3)),
}
WHOLE_TENSORS = ("full", "ewc", "last")
TUNING_SEED = 100
ARMS = (
    "zero",
    "full",
    "last",
    "lora",
    "shira",
    "supertuning",
    "ewc",
    "random",
    "inverse",
    "taylor",
    "fisher",
    "contrast",
    "gated",
    "joint",
)
DECIDING = ("zero", "full", "lora", "random", "contrast")
STUDIES = ("grimm", "friends", "openbookqa", "medmcqa", "piqa", "encoder")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Cell:
    """One run: everything its result depends on."""

    study: str
    arm: str
    rate: float
    seed: int
    core: float = 0.95
    steps: int = 120
    test: int = 200
    split: str = "test"

    @property
    def file(self) -> Path:
        """Where its result is stored."""
        fields = (self.study, self.arm, f"{self.rate:g}", self.seed, self.core, self.steps, self.test, self.split)
        return STORE / ("-".join(map(str, fields)) + ".json")


@dataclass
class Problem:
    """A model and what it shall learn and keep.

    Attributes:
        domain, general: endless batches to learn from, and to say what is not to be lost.
        scores: `(model, split) -> {"domain": ..., "domain task": ..., "general": ..., "general task": ...}`, those
            there are; higher is better.
        heads: parameters trained in full beside a mask or an adapter.
    """

    model: nn.Module
    domain: Callable[[int], Iterator[Batch]]
    general: Callable[[int], Iterator[Batch]]
    scores: Callable[[nn.Module, str], dict[str, float]]
    heads: tuple[str, ...] = ()


# -- decoder -----------------------------------------------------------------------------------------------------------


def decoder_problem(cell: Cell) -> Problem:
    """SmolLM2 with running text, or with questions and answers."""
    model, tokenizer = load_smollm2()
    collate = LanguageCollator(tokenizer)
    seed, count = cell.seed, cell.test

    def corpus(name: str) -> tuple[LanguageDataset, LanguageDataset]:
        texts = [Passage(text[:4000]) for text in load_corpus(name)]
        sides = split_passages(texts[:800], 0.3, seed=seed)
        return tuple(LanguageDataset(side, tokenizer, DECODER_LENGTH) for side in sides)

    news, held_out_news = corpus("xsum")
    keep = load_choices("commonsenseqa", train=0, validation=count // 2, test=count, seed=seed)
    if cell.study in ("grimm", "friends"):
        domain, held_out = corpus(cell.study)
        half = len(held_out) // 2
        places = {"validation": range(half), "test": range(half, len(held_out))}

        def domain_scores(model: nn.Module, split: str) -> dict[str, float]:
            items = [held_out[i] for i in list(places[split])[:count]]
            return {"domain": -mean_loss(model, items, collate)}
    else:
        task = load_choices(cell.study, train=1000, validation=count // 2, test=count, seed=seed)
        passages = [Passage(prompt(e), e.choices[e.answer]) for e in task.train]
        domain = LanguageDataset(passages, tokenizer, 2 * DECODER_LENGTH)

        def domain_scores(model: nn.Module, split: str) -> dict[str, float]:
            accuracy, loss = choice_scores(model, tokenizer, task.split(split))
            return {"domain": -loss, "domain task": accuracy}

    def scores(model: nn.Module, split: str) -> dict[str, float]:
        return {
            **domain_scores(model, split),
            "general": -mean_loss(model, [held_out_news[i] for i in range(min(count, len(held_out_news)))], collate),
            "general task": choice_scores(model, tokenizer, keep.split(split))[0],
        }

    return Problem(model, stream(domain, collate, DECODER_BATCH), stream(news, collate, DECODER_BATCH), scores)


def prompt(example: ChoiceExample) -> str:
    """A question as text."""
    return f"{example.passage}\nQuestion: {example.question}\nAnswer:".strip()


@torch.no_grad()
def choice_scores(model: nn.Module, tokenizer: Any, examples: Sequence[ChoiceExample]) -> tuple[float, float]:
    """Share of questions whose right choice has the highest mean log-probability per token, and the mean of the right
    choices' losses per token, which tells more from as few questions.
    """
    model.eval()
    collate, right, lost = LanguageCollator(tokenizer), 0, 0.0
    for example in examples:
        passages = [Passage(prompt(example), choice) for choice in example.choices]
        items = LanguageDataset(passages, tokenizer, 2 * DECODER_LENGTH)
        losses = losses_of(model, collate([items[i] for i in range(len(items))]))
        right += int(losses.argmin()) == example.answer
        lost += float(losses[example.answer])
    return right / len(examples), lost / len(examples)


@torch.no_grad()
def mean_loss(model: nn.Module, items: Sequence[Any], collate: Any) -> float:
    """Mean over items of the mean loss per token."""
    model.eval()
    parts = [losses_of(model, collate(items[i : i + 16])) for i in range(0, len(items), 16)]
    return float(torch.cat(parts).mean())


def losses_of(model: nn.Module, batch: Batch) -> Tensor:
    """One loss per example; of the language model inside peft's wrapper where there is one."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return task_losses(inner, batch)


# -- encoder -----------------------------------------------------------------------------------------------------------


def encoder_problem(cell: Cell) -> Problem:
    """MiniLM that has learnt newsgroups and shall learn sentiment."""
    old, new = (load_task(n, train=1500, validation=cell.test, test=cell.test, seed=cell.seed) for n in ENCODER_TASKS)
    backbone, tokenizer = load_encoder("minilm-l3")
    torch.manual_seed(cell.seed)
    model = ga.MultiTaskClassifier(backbone, {old.name: old.n_classes, new.name: new.n_classes})
    collate = MixedTaskCollator(tokenizer)
    sets = {
        split: [MixedTaskDataset([old, new], tokenizer, split, LENGTH)] for split in ("train", "validation", "test")
    }  # ids count both tasks

    def items(split: str, task: int) -> list[Any]:
        return [item for item in (sets[split][0][i] for i in range(len(sets[split][0]))) if item["task_ids"] == task]

    def accuracy(model: nn.Module, split: str, task: int) -> float:
        model.eval()
        rows, right = sorted(items(split, task), key=lambda item: len(item["input_ids"])), 0
        with torch.no_grad():
            for start in range(0, len(rows), 64):
                batch = collate(rows[start : start + 64])
                labels = batch.pop("labels")
                right += int((model(**batch).logits[:, : (old, new)[task].n_classes].argmax(-1) == labels).sum())
        return right / len(rows)

    before = stream(items("train", 0), collate)
    start = STORE.parent / "tmp" / f"forgetting-encoder-{cell.seed}-{FIRST_STEPS}.safetensors"  # for every arm
    if start.exists():
        model.load_state_dict(load_file(start))
    else:
        fit(model, list(model.parameters()), before(0), 3e-4, FIRST_STEPS)
        start.parent.mkdir(parents=True, exist_ok=True)
        part = start.with_suffix(f".{os.getpid()}.part")
        save_file(model.state_dict(), part)
        os.replace(part, start)
    heads = tuple(n for n, _ in model.named_parameters() if n.startswith("heads.") and new.name in n)
    return Problem(
        model,
        stream(items("train", 1), collate),
        before,
        lambda m, split: {"domain": accuracy(m, split, 1), "general": accuracy(m, split, 0)},
        heads,
    )


ENCODER_TASKS = ("newsgroups", "rotten_tomatoes")
FIRST_STEPS = 300


# -- arms --------------------------------------------------------------------------------------------------------------


def stream(data: Any, collate: Any, size: int = BATCH) -> Callable[[int], Iterator[Batch]]:
    """Endless shuffled batches by seed."""

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(data), generator=generator).tolist()
            for start in range(0, len(order) - size + 1, size):
                yield collate([data[i] for i in order[start : start + size]])

    return batches


def fit(
    model: nn.Module,
    trained: list[nn.Parameter],
    batches: Iterator[Batch],
    rate: float,
    steps: int,
    penalty: Callable[[], Tensor] | None = None,
    more: Sequence[dict[str, Any]] = (),
) -> None:
    """AdamW, linear decay after a warm-up of 6 %, clipped."""
    optimizer = torch.optim.AdamW([{"params": trained}, *more], lr=rate, weight_decay=0.0)
    warmup = max(1, round(0.06 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / warmup) * max(0.0, 1 - t / steps)
    )
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = losses_of(model, next(batches)).mean()
        (loss if penalty is None else loss + penalty()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()


def tuned(problem: Problem, cell: Cell) -> tuple[nn.Module, int]:
    """The model after the arm has had its way, and how many values it tuned."""
    model, arm = problem.model, cell.arm
    penalty = None
    if arm == "zero":
        return model, 0
    if arm in ("lora", "shira", "supertuning"):
        model = with_peft(arm, problem, cell)
    elif arm in ("gated", "joint"):
        return searched(problem, cell)
    elif arm == "last":
        ga.train_last_blocks(model, 1, heads=problem.heads)
    elif arm == "ewc":
        fisher = ga.score(model, taken(problem.general, 16), kind="fisher", heads=problem.heads)
        penalty = ga.ElasticPenalty(model, fisher, weight=1e4)
    elif arm != "full":
        ga.apply_mask(model, mask_of(problem, cell), heads=problem.heads)
    trained = [p for p in model.parameters() if p.requires_grad]
    fit(model, trained, problem.domain(cell.seed), cell.rate, cell.steps, penalty)
    return model, sum(p.numel() for p in trained)


def taken(batches: Callable[[int], Iterator[Batch]], count: int) -> list[Batch]:
    """Some batches to score by."""
    source = batches(1234)
    return [next(source) for _ in range(count)]


def mask_of(problem: Problem, cell: Cell) -> ga.Mask:
    """The arm's mask over the linear maps; all arms tune equally many elements."""
    general = taken(problem.general, 16)
    roles = ga.score(problem.model, kind="magnitude", heads=problem.heads).roles
    fixed = [role for role in ("embedding", "norm", "bias", "head") if role in roles.values()]
    fixed += ["heads.*"] if any(name.startswith("heads.") for name in roles) else []  # of what was learnt before
    options: dict[str, Any] = {"heads": problem.heads, "exclude": fixed, "seed": cell.seed}
    if cell.arm == "random":
        return ga.select(ga.score(problem.model, kind="random", **options), protect=cell.core)
    kind = "fisher" if cell.arm == "fisher" else "taylor"
    importance = ga.score(problem.model, general, kind=kind, **options)
    if cell.arm == "inverse":  # what matters most is free
        turned = {name: importance[name].max() - importance[name] for name in importance.names}
        return ga.select(ga.Scores(importance.record, turned), protect=cell.core)
    domain = None
    if cell.arm == "contrast":
        domain = ga.score(problem.model, taken(problem.domain, 16), kind=kind, **options)
    return ga.select(importance, domain, protect=cell.core)


def with_peft(arm: str, problem: Problem, cell: Cell) -> nn.Module:
    """LoRA, SHiRA or Super-Tuning of peft at every linear map of the blocks, as large as the masks."""
    from peft import LoraConfig, ShiraConfig, SupertuningConfig, get_peft_model

    maps, rank = maps_of(problem.model), rank_of(problem.model, cell)
    config = {
        "lora": lambda: LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=maps),
        "shira": lambda: ShiraConfig(r=rank, target_modules=maps, random_seed=cell.seed),
        "supertuning": lambda: SupertuningConfig(sparsity=cell.core, target_modules=maps),
    }[arm]()
    model = get_peft_model(problem.model, config)
    for name in problem.heads:
        problem.model.get_parameter(name).requires_grad_(True)
    return model


def maps_of(model: nn.Module) -> list[str]:
    """The linear maps of the blocks."""
    return [linear.name for _, _, linear in ga.discover(model).maps()]


def rank_of(model: nn.Module, cell: Cell) -> int:
    """Rank of LoRA at all of them with as many parameters as a mask has free elements."""
    shapes = [model.get_submodule(name).weight.shape for name in maps_of(model)]
    return max(1, round((1 - cell.core) * sum(a * b for a, b in shapes) / sum(a + b for a, b in shapes)))


def searched(problem: Problem, cell: Cell) -> tuple[nn.Module, int]:
    """A searched structure as large as the masks, or one of half the size beside a mask of half the density."""
    model = problem.model
    whole = round((1 - cell.core) * sum(model.get_submodule(name).weight.numel() for name in maps_of(model)))
    mask = mask_of(problem, replace(cell, arm="contrast", core=(1 + cell.core) / 2)) if cell.arm == "joint" else None
    space = {"paths": [{"kind": "lora", "rank": 4 * rank_of(model, cell)}]}
    inner = getattr(model, "backbone", model)  # one structure, whatever task an example is of
    adapters = ga.attach(inner, ga.SearchSpace.parse(space, where="forgetting"))
    free = [model.get_parameter(name).requires_grad_(True) for name in problem.heads]
    if mask is not None:
        delta = ga.apply_mask(model, mask, heads=problem.heads)
        free, whole = [*free, *delta.parameters()], whole - delta.params
    adapters.set_penalty(ga.Budget(params=whole), total_steps=cell.steps)
    gates = {"params": adapters.gate_parameters(), "lr": 0.1}
    trained = [*adapters.weight_parameters(), *free]
    fit(model, trained, problem.domain(cell.seed), cell.rate, cell.steps, adapters.penalty, [gates])
    return model, adapters.compact().params + sum(p.numel() for p in free)


# -- the study ---------------------------------------------------------------------------------------------------------


def compute(cell: Cell) -> dict[str, Any]:
    """One cell, from the pretrained model to its scores."""
    torch.manual_seed(cell.seed)
    problem = (encoder_problem if cell.study == "encoder" else decoder_problem)(cell)
    began = time.perf_counter()
    model, count = tuned(problem, cell)
    seconds = time.perf_counter() - began
    return {
        "cell": asdict(cell),
        "scores": problem.scores(model, cell.split),
        "trained": count,
        "seconds": round(seconds, 1),
        "versions": versions(),
    }


def run(cell: Cell) -> dict[str, Any]:
    """The stored result of a cell, computed now if nobody has; written whole or not at all."""
    return computed(cell.file, lambda: compute(cell))


def rates_of(study: str, arm: str) -> tuple[float, ...]:
    """What is tried for an arm; less of decoders, whose cells take minutes."""
    rates = RATES["full" if arm in WHOLE_TENSORS else "others"]
    return (0.0,) if arm == "zero" else rates[study != "encoder"]


def tuned_rate(study: str, arm: str, options: dict[str, Any], *, compute_missing: bool) -> float | None:
    """The rate with the best mean of domain and general score on validation data, with a seed that the comparison does
    not use. By the domain's score alone every arm is driven to where it forgets most.
    """
    rates = rates_of(study, arm)
    if len(rates) == 1:
        return rates[0]
    found = {}
    for rate in rates:
        cell = Cell(study, arm, rate, TUNING_SEED, split="validation", **options)
        if compute_missing or cell.file.exists():
            scores = run(cell)["scores"]
            found[rate] = scores["domain"] + scores["general"]
    return max(found, key=lambda rate: found[rate]) if len(found) == len(rates) else None


def stored() -> dict[tuple[str, float], dict[str, dict[int, dict[str, Any]]]]:
    """Test cells: by (study, core), arm and seed; each arm at its tuned rate."""
    found: dict[tuple[str, float], dict[str, dict[int, dict[str, Any]]]] = {}
    for file in sorted(STORE.glob("*.json")):
        result = json.loads(file.read_text())
        cell = Cell(**result["cell"])
        options = {"core": cell.core, "steps": cell.steps, "test": cell.test}
        if cell.split == "test" and cell.rate == tuned_rate(cell.study, cell.arm, options, compute_missing=False):
            found.setdefault((cell.study, cell.core), {}).setdefault(cell.arm, {})[cell.seed] = result
    return found


SCORES = ("domain", "domain task", "general", "general task")


def table() -> str:
    """Every study from the stored cells, and contrast minus each arm, paired by seed. Accuracies in points, losses per
    token negated: higher is better everywhere.
    """
    rows = []
    for (study, core), arms in stored().items():
        ours = arms.get("contrast", {})
        for arm in [arm for arm in ARMS if arm in arms]:
            cells = arms[arm]
            columns, differences = [], []
            for key in SCORES:
                times = 100 if study == "encoder" or key.endswith("task") else 1
                values = {seed: cell["scores"][key] for seed, cell in cells.items() if key in cell["scores"]}
                columns.append(shown(values.values(), times=times))
                seeds = sorted(values.keys() & ours) if arm != "contrast" else []
                pairs = [ours[seed]["scores"][key] - values[seed] for seed in seeds]
                if not key.endswith("task"):
                    differences.append(shown(pairs, times=times, signed=True))
            first = next(iter(cells.values()))
            count, rate = f"{first['trained']:,}", f"{first['cell']['rate']:g}"
            rows.append([study, f"{core:g}", arm, rate, str(len(cells)), *columns, *differences, count])
    header = ["study", "core", "arm", "rate", "seeds", *SCORES, "contrast - arm: domain", "general", "trained"]
    return format_table(header, rows)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table", "picture"))
    parser.add_argument("file", nargs="?", type=Path, default=Path("forgetting.png"))
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=[s for s in STUDIES if s != "friends"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=None, help="default: all on the encoder, else five")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="default: five on the encoder, else two")
    parser.add_argument("--core", nargs="+", type=float, default=[0.95], help="several: the sweep over the core")
    parser.add_argument("--steps", type=int, help="default: 120 on the encoder, else 30")
    parser.add_argument("--test", type=int, help="test examples of each kind; default: 600 on the encoder, else 60")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.command == "picture":
        trade_off(stored(), ARMS, options.file)
        return
    for study in options.studies if options.command == "run" else ():
        arms = options.arms or (ARMS if study == "encoder" else DECIDING)
        for core in options.core:
            steps, test = (120, 600) if study == "encoder" else (30, 60)
            shared = {"core": core, "steps": options.steps or steps, "test": options.test or test}
            rates = {arm: tuned_rate(study, arm, shared, compute_missing=True) for arm in arms}
            for seed in options.seeds or (range(5) if study == "encoder" else range(2)):
                for arm, rate in rates.items():
                    assert rate is not None
                    result = run(Cell(study, arm, rate, seed, **shared))
                    print(study, core, arm, f"seed {seed}", result["scores"], flush=True)
    print(table())


if __name__ == "__main__":
    main()
