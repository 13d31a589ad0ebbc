"""The problems: a model, what it shall learn, and what it shall not forget."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gatedadapters as ga
from benchmarks.common.store import SCRATCH
from benchmarks.studies.forgetting.cells import Cell
from gatedadapters.data import ChoiceExample, MixedTaskCollator, MixedTaskDataset, Passage
from gatedadapters.data.bundled import load_choices, load_corpus, load_encoder, load_smollm2, load_task
from gatedadapters.data.language import LanguageCollator, LanguageDataset, split_examples
from gatedadapters.experiments.evaluation import accuracies, score_tasks
from gatedadapters.masking.scores.losses import task_losses

BATCH, LENGTH = 8, 40
DECODER_BATCH, DECODER_LENGTH = 4, 64
ENCODER_TASKS, FIRST_STEPS = ("newsgroups", "rotten_tomatoes"), 300
Batch = dict[str, Tensor]


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


def problem_of(cell: Cell) -> Problem:
    """The problem of a cell's study."""
    return encoder_problem(cell) if cell.study == "encoder" else decoder_problem(cell)


# -- decoder -----------------------------------------------------------------------------------------------------------


def decoder_problem(cell: Cell) -> Problem:
    """SmolLM2 with running text, or with questions and answers."""
    model, tokenizer = load_smollm2()
    collate = LanguageCollator(tokenizer)
    seed, count = cell.seed, cell.test

    def corpus(name: str) -> tuple[LanguageDataset, LanguageDataset]:
        texts = [Passage(text[:4000]) for text in load_corpus(name)]
        sides = split_examples(texts[:800], 0.3, seed=seed)
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
    data = MixedTaskDataset([old, new], tokenizer, "train", LENGTH)  # ids count both tasks
    train = [[item for item in data if item["task_ids"] == task] for task in (0, 1)]
    before = stream(train[0], collate)
    start = SCRATCH / "forgetting" / f"encoder-{cell.seed}-{FIRST_STEPS}.safetensors"  # shared by all arms
    if start.exists():
        model.load_state_dict(load_file(start))
    else:
        fit(model, list(model.parameters()), before(0), 3e-4, FIRST_STEPS)
        start.parent.mkdir(parents=True, exist_ok=True)
        part = start.with_suffix(f".{os.getpid()}.part")
        save_file(model.state_dict(), part)
        os.replace(part, start)

    def scores(model: nn.Module, split: str) -> dict[str, float]:
        found = accuracies(score_tasks(model, [old, new], tokenizer, LENGTH, split=split))
        return {"domain": found[new.name], "general": found[old.name]}

    heads = tuple(n for n, _ in model.named_parameters() if n.startswith("heads.") and new.name in n)
    return Problem(model, stream(train[1], collate), before, scores, heads)


# -- training ----------------------------------------------------------------------------------------------------------


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
