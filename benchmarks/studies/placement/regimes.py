"""The regimes: what is learned, from which candidates, at which size. They were fixed before any score was judged.

`smollm2-id-35k` and `tweets-1536` are there to tune scores on; the others are the test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, set_seed

import gatedadapters as ga
from benchmarks.common.store import SCRATCH, locked
from benchmarks.common.training import training_arguments
from benchmarks.studies.placement.precision import precision
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset
from gatedadapters.data.bundled import load_corpus, load_encoder, load_smollm2, load_task
from gatedadapters.data.language import LanguageCollator, LanguageDataset, Passage, split_examples
from gatedadapters.data.tasks import Examples, TextTask, stratified_sample
from gatedadapters.masking.scores.losses import task_losses

Batch = dict[str, Tensor]
Items = Sequence[dict[str, Any]]
HELD_OUT, LABELLED, FEW = 4000, 6000, 400  # texts: held out, to learn from, to learn from where labels are few
HELD_OUT_BLOCKS, BLOCK = 118, 128  # 15 thousand tokens of running text
WORDS = 32  # word pieces after which a text is cut
TUNING = ("smollm2-id-35k", "tweets-1536")

_IA3 = (
    {"kind": "scale", "side": "output", "at": {"sublayers": ["attention"], "roles": ["k", "v"]}},
    {"kind": "scale", "side": "input", "at": {"sublayers": ["feed_forward"], "roles": ["down"]}},
)
SPACES = {
    "tiny": (
        *({"kind": "norm"}, {"kind": "bias"}, *_IA3, {"kind": "lora", "rank": 2}),
        {"kind": "elements", "k": 1152, "chunk": 96},
    ),
    "large": (
        *({"kind": "norm"}, {"kind": "bias"}, *_IA3, {"kind": "lora", "rank": 16}),
        {"kind": "lora", "rank": 4, "at": {"sublayers": ["embedding"]}},
        {"kind": "elements", "k": 3072, "chunk": 384},
        {"kind": "parallel", "width": 16, "activation": "silu", "at": {"sublayers": ["attention", "feed_forward"]}},
        {"kind": "serial", "width": 16, "activation": "silu", "at": {"sublayers": ["feed_forward"]}},
    ),
}
"""The candidates. They are written out here because a preset may change, and results must not change their meaning."""


@dataclass
class Problem:
    """A model and its data, loaded once for all cells of a process.

    Attributes:
        model: the backbone with its head.
        items: what a seed learns from.
        collate: makes a batch of items.
        held_out: batches of what is measured on, the same for all seeds.
        measure: the loss of each held-out text of a batch, and whether the model is right, where that has a meaning.
        heads: parameters trained in full beside the adapters.
        train_loss: of logits and labels, one loss per text; None is the model's own loss.
    """

    model: nn.Module
    items: Callable[[int], Items]
    collate: Callable[[Items], Batch]
    held_out: list[Batch]
    measure: Callable[[nn.Module, Batch], tuple[Tensor, Tensor | None]]
    heads: tuple[str, ...] = ()
    train_loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        self._start = {name: p.detach().clone() for name, p in self.model.named_parameters() if self._is_head(name)}

    @property
    def trainer_loss(self) -> Callable[..., Tensor] | None:
        """`compute_loss_func` of transformers' Trainer; None where the model's own loss is meant."""
        loss = self.train_loss
        if loss is None:
            return None
        return lambda outputs, labels, num_items_in_batch=None: loss(outputs.logits, labels).mean()

    @property
    def score_loss(self) -> Callable[[nn.Module, Batch], Tensor] | None:
        """`loss` of `gatedadapters.allocation.place`; None where the model's own loss is meant."""
        loss = self.train_loss
        return None if loss is None else lambda model, batch: loss(logits_of(model, batch), batch["labels"])

    def batches(self, seed: int, size: int) -> Iterator[Batch]:
        """Shuffled batches of what a seed learns from, without end."""
        items, generator = self.items(seed), torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(items), generator=generator).tolist()
            for start in range(0, len(order) - size + 1, size):
                yield self.collate([items[i] for i in order[start : start + size]])

    def _is_head(self, name: str) -> bool:
        return name.startswith(tuple(f"{head}." for head in self.heads))

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw the heads anew; everything else is frozen and never changes."""
        generator = torch.Generator().manual_seed(seed)
        for name, start in self._start.items():
            value = 0.02 * torch.randn(start.shape, generator=generator) if start.dim() > 1 else torch.zeros_like(start)
            self.model.get_parameter(name).copy_(value)


@dataclass(frozen=True)
class Regime:
    """What every structure is trained for.

    Attributes:
        name: in names of cells and in tables.
        space: the candidates, a key of `SPACES`.
        size: of every structure, in parameters.
        steps: of the optimiser.
        batch: examples a step.
        load: makes the problem.
        group: regimes of one group share their structures, and tables show their mean.
    """

    name: str
    space: str
    size: int
    steps: int
    batch: int
    load: Callable[[], Problem]
    group: str

    @property
    def search_space(self) -> ga.SearchSpace:
        """The candidates."""
        return ga.SearchSpace.parse({"name": self.space, "paths": SPACES[self.space]}, where=self.name)

    def arguments(self, rate: float, seed: int, *, bf16: bool) -> TrainingArguments:
        """How everything is trained here."""
        return training_arguments(steps=self.steps, batch=self.batch, rate=rate, seed=seed, bf16=bf16)

    @functools.cached_property
    def problem(self) -> Problem:
        """The model and its data, loaded at the first use."""
        return self.load()


# -- a new language ----------------------------------------------------------------------------------------------------


@functools.cache
def indonesian() -> Problem:
    """SmolLM2 learns Indonesian; the loss per token of each held-out block."""
    model, tokenizer = load_smollm2()
    passages = [Passage(text) for text in load_corpus("quran_indonesian")]
    learned, kept = (LanguageDataset(side, tokenizer, BLOCK) for side in split_examples(passages, 0.15, seed=0))
    blocks = [kept[int(i)] for i in np.linspace(0, len(kept) - 2, HELD_OUT_BLOCKS)]
    collate = LanguageCollator(tokenizer)
    held_out = [collate(blocks[i : i + 4]) for i in range(0, len(blocks), 4)]
    return Problem(model, lambda seed: [learned[i] for i in range(len(learned))], collate, held_out, language_measure)


def language_measure(model: nn.Module, batch: Batch) -> tuple[Tensor, None]:
    """The loss per token of each block."""
    return task_losses(model, batch), None


# -- labelled texts ----------------------------------------------------------------------------------------------------


@functools.cache
def labelled(name: str) -> Problem:
    """MiniLM-L6 learns to tell the classes of a task, with a new head."""
    task = load_task(name, train=LABELLED, validation=0, test=HELD_OUT, seed=0)
    return classifier(task, lambda seed: task.train)


def classifier(
    task: TextTask,
    texts: Callable[[int], Examples],
    *,
    model: nn.Module | None = None,
    change: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Problem:
    """MiniLM-L6 with a head for a task.

    Args:
        task: its test split is held out.
        texts: what a seed learns from.
        model: a model whose head stays as it is; default: a new one.
        change: what is done to every tokenised text.
    """
    backbone, tokenizer = load_encoder("minilm-l6")
    new = ga.MultiTaskClassifier(backbone, {task.name: task.n_classes}) if model is None else model
    pad = MixedTaskCollator(tokenizer)

    @functools.lru_cache(maxsize=1)
    def items(seed: int) -> Items:
        return tokenised(texts(seed))

    def tokenised(examples: Examples) -> Items:
        one = TextTask(task.name, examples, examples, None, task.classes)
        return [change(item) for item in MixedTaskDataset([one], tokenizer, "train", WORDS)]

    assert task.test is not None
    held_out = sorted(tokenised(task.test), key=lambda item: len(item["input_ids"]))  # little padding
    return Problem(
        new,
        items,
        lambda batch: without_task_ids(pad(batch)),
        [without_task_ids(pad(held_out[i : i + 125])) for i in range(0, len(held_out), 125)],
        class_measure,
        heads=("heads",) if model is None else (),
    )


def without_task_ids(batch: Batch) -> Batch:
    """There is one task only."""
    return {name: value for name, value in batch.items() if name != "task_ids"}


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """(texts, classes), in fp32."""
    logits: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return logits.float()


def class_measure(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each text, and whether its class is the likeliest."""
    logits = logits_of(model, batch)
    return F.cross_entropy(logits, batch["labels"], reduction="none"), logits.argmax(-1) == batch["labels"]


# -- shifts with few labels --------------------------------------------------------------------------------------------


@functools.cache
def shifted(shift: str) -> Problem:
    """MiniLM-L6, tuned in full on tweets, meets other input; its head stays as it is."""
    tweets = load_task("tweets", train=12000, validation=LABELLED, test=HELD_OUT, seed=0)
    model = tuned_on(tweets)
    if shift == "reviews":
        reviews = load_task("rotten_tomatoes", train=LABELLED, validation=0, test=HELD_OUT, seed=0)
        sides = {"fresh": tweets.classes.index("positive"), "rotten": tweets.classes.index("negative")}
        task = relabelled(reviews, [sides[name] for name in reviews.classes], tweets)
        return classifier(task, lambda seed: few(task.train, seed), model=model)
    if shift == "leet":
        task = TextTask(tweets.name, leet(tweets.train), leet(tweets.validation), leet(tweets.test), tweets.classes)
        return classifier(task, lambda seed: few(task.validation, seed), model=model)
    return classifier(tweets, lambda seed: few(tweets.validation, seed), model=model, change=permuted)


def tuned_on(task: TextTask) -> nn.Module:
    """MiniLM-L6 with a head, both tuned on a task; computed once and kept."""

    def fresh() -> tuple[nn.Module, Any]:
        backbone, tokenizer = load_encoder("minilm-l6")
        set_seed(0)
        return ga.MultiTaskClassifier(backbone, {task.name: task.n_classes}), tokenizer

    file = SCRATCH / "placement" / f"minilm-l6-{task.name}.safetensors"
    with locked(file.with_suffix(".lock")):
        if not file.exists():
            model, tokenizer = fresh()
            args = training_arguments(steps=400, batch=32, rate=1e-4, seed=0, bf16=precision() == "bf16")
            data = MixedTaskDataset([task], tokenizer, "train", WORDS)
            Trainer(model, args, train_dataset=data, data_collator=MixedTaskCollator(tokenizer)).train()
            part = file.with_suffix(".part")
            save_file(model.state_dict(), part)
            part.rename(file)
    model, _ = fresh()
    model.load_state_dict(load_file(file))
    return model


def few(examples: Examples, seed: int) -> Examples:
    """The few examples of a seed, none of which the model was tuned on."""
    chosen = stratified_sample(examples.labels, FEW, seed)
    return Examples([examples.texts[i] for i in chosen], [examples.labels[i] for i in chosen])


def relabelled(task: TextTask, labels: Sequence[int], like: TextTask) -> TextTask:
    """A task with the classes of another."""
    assert task.test is not None
    parts = (task.train, task.validation, task.test)
    return TextTask(
        task.name, *(Examples(part.texts, [labels[i] for i in part.labels]) for part in parts), like.classes
    )


def leet(examples: Examples | None) -> Examples:
    """The texts in leet spelling."""
    assert examples is not None
    table = str.maketrans("aeiostAEIOST", "431057431057")
    return Examples([text.translate(table) for text in examples.texts], examples.labels)


def permuted(item: dict[str, Any], *, share: float = 0.5, first: int = 1996, count: int = 30522) -> dict[str, Any]:
    """A text in which a fixed random share of all word pieces have changed places.

    Args:
        item: a tokenised text.
        share: of the word pieces.
        first: number of the first word piece; below it are special and single characters.
        count: of the vocabulary.
    """
    return {**item, "input_ids": permutation(share, first, count)[item["input_ids"]].tolist()}


@functools.cache
def permutation(share: float, first: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The new number of each word piece."""
    draw = np.random.default_rng(0)
    moved = draw.permutation(np.arange(first, count))[: round(share * (count - first))]
    table = np.arange(count)
    table[np.sort(moved)] = moved
    return table


# -- reward instead of labels ------------------------------------------------------------------------------------------


@functools.cache
def rewarded() -> Problem:
    """MiniLM-L6 guesses the class of a tweet and is told only whether that was right."""
    problem = labelled.__wrapped__("tweets")
    problem.measure, problem.train_loss = reward_measure, policy_gradient
    return problem


def policy_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """One loss per text, whose gradient is that of minus the reward: a class is drawn from the model's own softmax and
    rewarded with 1 if it is right; the baseline is the mean reward of the others in the batch.
    """
    log_p = logits.float().log_softmax(-1)
    drawn = torch.multinomial(log_p.detach().exp(), 1)
    reward = (drawn[:, 0] == labels).float()
    baseline = (reward.sum() - reward) / max(1, len(reward) - 1)
    return -(reward - baseline) * log_p.gather(1, drawn)[:, 0]


def reward_measure(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The reward that each text is expected to miss: 1 - P(its class); and whether its class is the likeliest."""
    logits = logits_of(model, batch)
    missed = 1 - logits.softmax(-1).gather(1, batch["labels"][:, None])[:, 0]
    return missed, logits.argmax(-1) == batch["labels"]


REGIMES = {
    regime.name: regime
    for regime in (
        Regime("smollm2-id-35k", "tiny", 35_136, 40, 4, indonesian, "smollm2-id-35k"),
        Regime("tweets-1536", "tiny", 1_536, 120, 16, lambda: labelled("tweets"), "tweets-1536"),
        Regime("newsgroups-3072", "tiny", 3_072, 120, 16, lambda: labelled("newsgroups"), "newsgroups-3072"),
        *(
            Regime(f"shift-{shift}", "tiny", 3_072, 75, 16, functools.partial(shifted, shift), "shifts")
            for shift in ("pieces", "leet", "reviews")
        ),
        Regime("tweets-reward", "tiny", 3_072, 200, 16, rewarded, "tweets-reward"),
        Regime("smollm2-id-57k", "tiny", 57_600, 40, 4, indonesian, "smollm2-id-57k"),
        Regime("smollm2-id-305k", "large", 305_280, 40, 4, indonesian, "smollm2-id-305k"),
        Regime("tweets-3072", "tiny", 3_072, 120, 16, lambda: labelled("tweets"), "tweets-3072"),
        Regime("newsgroups-1536", "tiny", 1_536, 120, 16, lambda: labelled("newsgroups"), "newsgroups-1536"),
    )
}
