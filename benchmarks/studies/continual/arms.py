"""The streams, and the arms: each is a strategy of continual tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gatedadapters as ga
from benchmarks.common.store import SCRATCH
from benchmarks.studies.continual.cells import COUNTED_LIKE, HELD_OUT, QUESTIONS, SEEDS, TUNED_LIKE, Cell, counted
from benchmarks.studies.continual.label_matching import label_matcher
from gatedadapters.config import StreamTrainingConfig
from gatedadapters.continual import Task, TaskStream, choice_tasks, classification_tasks
from gatedadapters.continual.measures import MeasuredTask, nearest_class, token_scores
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset
from gatedadapters.data.bundled import load_choices, load_corpus, load_encoder, load_smollm2, load_task
from gatedadapters.data.language import LanguageCollator, LanguageDataset, Passage, split_examples

TEXTS, GENERAL = ("newsgroups", "r8", "tweets", "rotten_tomatoes", "subjectivity"), "medical_specialty"
CHOICES = ("openbookqa", "piqa", "medmcqa")
CORPORA, QUESTIONS_TASK, NEWS = ("quran_indonesian", "chinese_reviews", "friends", "grimm"), "commonsenseqa", "xsum"
BLOCK, BLOCKS, HELD_OUT_BLOCKS = 128, 400, 16  # of running text: tokens of one; how many to learn from and to score
TRAIN, LENGTH, BATCH = 800, 20, 16
CORES: dict[str, dict[str, Any]] = {  # of selecting arms that do not take the default
    "matrices": {"exclude": ["bias", "norm", "embedding"], "share": 0.12},  # 2 of 18, 4 of 36
    "elements": {"granularity": "element", "share": 0.05},
}


def order_of(stream: int, count: int) -> list[int]:
    """The order of a stream's tasks."""
    return list(range(count)) if stream == 0 else np.random.default_rng(stream).permutation(count).tolist()


def encoder_stream(cell: Cell) -> tuple[Any, TaskStream]:
    """A bundled encoder that matches texts with names of classes, and the tasks in the stream's order."""
    sizes = {"train": TRAIN, "validation": HELD_OUT, "test": HELD_OUT, "seed": cell.stream}
    texts = [load_task(name, **sizes) for name in TEXTS]
    backbone, tokenizer = load_encoder(cell.study)
    backbone.pooler = None  # no task reads it
    model = label_matcher(backbone, texts, tokenizer)
    labelled = classification_tasks(model, texts, tokenizer, max_length=LENGTH, split=cell.split)
    tasks = [replace(task, heads=()) for task in labelled]
    other = load_task(GENERAL, train=200, validation=HELD_OUT, test=HELD_OUT, seed=cell.stream)
    parts = [list(MixedTaskDataset([other], tokenizer, part, LENGTH)) for part in ("train", cell.split)]
    general = Task(GENERAL, *parts, MixedTaskCollator(tokenizer), nearest_class)
    keep_words(backbone, [item for task in (*tasks, general) for part in (task.train, task.held_out) for item in part])
    order = order_of(cell.stream, len(tasks))[: cell.tasks]
    return model, TaskStream([tasks[i] for i in order], general)


def keep_words(backbone: Any, items: Sequence[dict[str, Any]]) -> None:
    """Cut the word table down to the words of the stream, in place: no other row is ever read, nor moved by any arm,
    and most of the time of full fine-tuning would go into them.
    """
    words = sorted({0, *(word for item in items for word in item["input_ids"])})  # 0 pads
    place = {word: index for index, word in enumerate(words)}
    for item in items:
        item["input_ids"] = [place[word] for word in item["input_ids"]]
    table = torch.nn.Embedding(len(words), backbone.config.hidden_size, padding_idx=0)
    table.weight.data = backbone.get_input_embeddings().weight.data[words].clone()
    backbone.set_input_embeddings(table)


def decoder_stream(cell: Cell) -> tuple[Any, TaskStream]:
    """SmolLM2 and multiple-choice tasks; a further one measures general ability."""
    model, tokenizer = load_smollm2()
    names = [CHOICES[i] for i in order_of(cell.stream, len(CHOICES))][: cell.tasks]
    sizes = {"train": 400, **QUESTIONS, "seed": cell.stream}
    *tasks, general = choice_tasks(
        [load_choices(name, **sizes) for name in (*names, "commonsenseqa")], tokenizer, max_length=64, split=cell.split
    )
    return model, TaskStream(tasks, general if cell.split == "test" else None)  # most of the time goes into scores


def minus_loss(model: torch.nn.Module, task: MeasuredTask) -> float:
    """Minus the loss per token, in nats: higher is better, as of all scores."""
    return -token_scores(model, task.held_out, task.collate)[0]


def texts_stream(cell: Cell) -> tuple[Any, TaskStream]:
    """SmolLM2, and one text task after the other: two languages, dialogue, tales, questions. English news, which are
    never learned, measure general ability. All scores are minus losses per token.
    """
    model, tokenizer = load_smollm2()
    collate = LanguageCollator(tokenizer)
    seed = cell.stream % SEEDS

    def blocks(name: str) -> Task:
        """Blocks of running text: what is held out never moves, what is learned is drawn by the seed."""
        passages = [Passage(text) for text in load_corpus(name)]
        learned, kept = split_examples(passages, 0.15, seed=0)
        if cell.split == "validation":
            learned, kept = split_examples(learned, 0.15, seed=0)
        sides = [LanguageDataset(side, tokenizer, BLOCK) for side in (learned, kept)]
        drawn = np.random.default_rng(seed).permutation(len(sides[0]))[:BLOCKS]
        spread = np.linspace(0, len(sides[1]) - 1, min(HELD_OUT_BLOCKS, len(sides[1]))).astype(int)
        parts = [[side[int(i)] for i in which] for side, which in zip(sides, (drawn, spread), strict=True)]
        return Task(name, *parts, collate, minus_loss)

    questions = load_choices(QUESTIONS_TASK, train=BLOCKS, **QUESTIONS, seed=seed)
    parts = [LanguageDataset(questions.split(part), tokenizer, BLOCK) for part in ("train", cell.split)]
    tasks = [*map(blocks, CORPORA), Task(QUESTIONS_TASK, *parts, collate, minus_loss)]
    chosen = [tasks[i] for i in order_of(cell.stream // SEEDS, len(tasks))[: cell.tasks]]
    return model, TaskStream(chosen, blocks(NEWS))


def stream_of(cell: Cell) -> tuple[Any, TaskStream]:
    """The model and the tasks of a cell."""
    return {"smollm2": decoder_stream, "smollm2-texts": texts_stream}.get(cell.study, encoder_stream)(cell)


def strategy_of(cell: Cell) -> dict[str, Any]:
    """The arm as a strategy and its options."""
    decoder = cell.study.startswith("smollm2")
    fisher_batches = 10 if decoder else 20
    warm = {  # a third of tuning, as released
        "steps": max(1, cell.steps // 3),
        "batch_size": 4 if decoder else BATCH,
        "fisher_batches": fisher_batches,
    }
    kind, *parts = cell.arm.split("-")
    core = next(({"core": CORES[part]} for part in parts if part in CORES), {})
    if decoder and "matrices" in parts:  # it has no biases
        core = {"core": CORES["matrices"] | {"exclude": ["norm", "embedding"]}}
    if "short" in parts:
        warm |= {"steps": max(1, cell.steps // 10), "fisher_batches": fisher_batches // 2}
    elif "gradient" in parts:
        warm = {"kind": "gradient", "fisher_batches": fisher_batches}
    if kind in ("l2_fisher", "cosine", "lota"):
        return {"kind": kind, "probe": warm, **core}
    if cell.arm in COUNTED_LIKE:
        return {"kind": "random", "elements": counted(cell), **core}
    if kind == "random":
        return {"kind": kind, **core}
    if cell.arm == "carried":
        return {"kind": "carried", "source": str(small_stream(cell))}
    options = {name: value for name, value in cell.setting if name != "rate"}
    return {"kind": cell.arm, **options}


def small_stream(cell: Cell) -> Path:
    """Folder of the same stream on the 3-layer encoder under the arm whose cores are carried; run if nobody has."""
    small = replace(cell, study="minilm-l3", arm=TUNED_LIKE["carried"])
    folder = SCRATCH / f"continual-l3-{cell.stream}-{cell.steps}-{cell.tasks}-{cell.split}"
    model, stream = encoder_stream(small)
    ga.run_stream(model, stream, strategy_of(small), training=training_of(small), folder=folder)
    return folder


def training_of(cell: Cell) -> StreamTrainingConfig:
    """How each task is tuned."""
    return StreamTrainingConfig(
        steps=cell.steps,
        batch_size=4 if cell.study.startswith("smollm2") else BATCH,
        learning_rate=dict(cell.setting)["rate"],
        seed=cell.stream,
        precision="bf16" if cell.study == "smollm2-texts" else "fp32",
        device="cpu",
        checkpoint_steps=None,
    )
