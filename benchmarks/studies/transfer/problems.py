"""What adapters learn before an update, the bases before and after it, and how a model is measured."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, set_seed

import gatedadapters as ga
from benchmarks.common.store import locked
from benchmarks.studies.placement.precision import autocast, precision
from benchmarks.studies.placement.regimes import class_measure, language_measure, without_task_ids
from benchmarks.studies.transfer.cells import STORE
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset
from gatedadapters.data.bundled import load_corpus, load_task, model_folder
from gatedadapters.data.bundled.models import cache_folder
from gatedadapters.data.language import LanguageCollator, LanguageDataset, Passage, split_examples
from gatedadapters.transfer import simulate_update

Batch = dict[str, Tensor]
WORDS, BLOCK = 32, 64  # tokens of a labelled text, and of a block of running text
TUNED = {"r8": 40}  # an update of our own: the encoder tuned in full on another task, for so many steps
# steps and rate of continued pretraining on dialogue; each goes on from the one before
PRETRAINED = {"small": (20, 3e-4), "medium": (40, 5e-4), "large": (80, 1e-3)}


@dataclass(frozen=True)
class Setting:
    """A base, its updates, and how adapters are trained on it.

    Attributes:
        name: in names of cells.
        updates: their names; the first is the one that every arm runs on.
        tasks: their names.
        steps: of a whole training.
        batch: examples a step.
        texts: to learn from, of a labelled task; of running text there is as much as the corpus has.
        held_out: texts or blocks that are measured on.
        probe: unlabelled examples in a batch that a prediction reads.
        rate: the common rate of all kinds of path.
    """

    name: str
    updates: tuple[str, ...]
    tasks: tuple[str, ...]
    steps: int
    batch: int
    texts: int
    held_out: int
    probe: int
    rate: float = 1e-2


ENCODER = Setting(
    "minilm",
    ("real",),
    ("newsgroups", "tweets", "rotten_tomatoes"),
    steps=80,
    batch=16,
    texts=1000,
    held_out=750,
    probe=16,
)
# shorter trainings: many pairs of an adapter and an update
PAIRS = Setting(
    "minilm-pairs",
    ("real", "half", "twice", "r8"),
    ("newsgroups", "tweets", "medical_specialty", "subjectivity"),
    steps=40,
    batch=16,
    texts=800,
    held_out=400,
    probe=16,
)
DECODER = Setting(
    "smollm2", ("medium", "small", "large"), ("indonesian", "tales"), steps=40, batch=4, texts=0, held_out=48, probe=4
)
CORPORA = {"indonesian": "quran_indonesian", "tales": "grimm"}


@dataclass
class Problem:
    """One task with one seed.

    Attributes:
        build: from the name of a base (`old`, or an update) to a fresh model; its heads depend on the seed alone.
        items: what is learned from.
        collate: makes a batch of items.
        held_out: batches of what is measured on.
        measure: the loss of each held-out text of a batch, and whether the model is right, where that has a meaning.
    """

    build: Callable[[str], nn.Module]
    items: list[dict[str, Any]]
    collate: Callable[[list[dict[str, Any]]], Batch]
    held_out: list[Batch]
    measure: Callable[[nn.Module, Batch], tuple[Tensor, Tensor | None]]

    def batches(self, seed: int, size: int, *, labels: bool = True) -> Iterator[Batch]:
        """Shuffled batches of what is learned from, without end."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.items), generator=generator).tolist()
            for start in range(0, len(order) - size + 1, size):
                batch = self.collate([self.items[i] for i in order[start : start + size]])
                yield batch if labels else {name: value for name, value in batch.items() if name != "labels"}

    @torch.no_grad()
    def score(self, model: nn.Module) -> dict[str, float]:
        """Loss and accuracy over all held-out texts."""
        model.eval()
        with autocast():
            parts = [self.measure(model, batch) for batch in self.held_out]
        found = {"loss": float(torch.cat([loss.float() for loss, _ in parts]).mean())}
        right = [hits.float() for _, hits in parts if hits is not None]
        return {**found, "accuracy": float(torch.cat(right).mean())} if right else found


def problem(setting: Setting, task: str, seed: int) -> Problem:
    """The data of a seed, and the models."""
    if setting is DECODER:
        return _running(task, seed, setting.held_out)
    return _labelled(task, seed, setting.texts, setting.held_out)


@functools.lru_cache(maxsize=1)
def _labelled(name: str, seed: int, texts: int, count: int) -> Problem:
    task = load_task(name, train=texts, validation=100, test=count, seed=seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder("minilm-l6"))
    pad = MixedTaskCollator(tokenizer)

    def build(base: str) -> nn.Module:
        set_seed(seed)
        return ga.MultiTaskClassifier(encoder(base), {task.name: task.n_classes})

    def collate(items: list[dict[str, Any]]) -> Batch:
        return without_task_ids(pad(items))

    data, test = (MixedTaskDataset([task], tokenizer, split, WORDS) for split in ("train", "test"))
    held = sorted((test[i] for i in range(len(test))), key=lambda item: len(item["input_ids"]))  # little padding
    held_out = [collate(held[i : i + 125]) for i in range(0, len(held), 125)]
    return Problem(build, [data[i] for i in range(len(data))], collate, held_out, class_measure)


@functools.lru_cache(maxsize=1)
def _running(name: str, seed: int, count: int) -> Problem:
    tokenizer = AutoTokenizer.from_pretrained(model_folder("smollm2"))
    passages = [Passage(text) for text in load_corpus(CORPORA[name])]
    learned, kept = (LanguageDataset(side, tokenizer, BLOCK) for side in split_examples(passages, 0.15, seed=0))
    blocks = [kept[int(i)] for i in np.linspace(0, len(kept) - 2, count)]
    collate = LanguageCollator(tokenizer)
    held_out = [collate(blocks[i : i + 8]) for i in range(0, len(blocks), 8)]

    def build(base: str) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(decoder(base), dtype=torch.float32)

    return Problem(build, [learned[i] for i in range(len(learned))], collate, held_out, language_measure)


# -- bases -------------------------------------------------------------------------------------------------------------


def encoder(base: str) -> nn.Module:
    """MiniLM-L6: as released (`old`), after its real update (`real`), half or twice as far in that direction, or tuned
    in full on another task.
    """
    model: nn.Module = AutoModel.from_pretrained(model_folder("minilm-l6"), dtype=torch.float32)
    if base in ("real", "half", "twice"):
        share = {"real": 1.0, "half": 0.5, "twice": 2.0}[base]
        new = AutoModel.from_pretrained(model_folder("minilm-l6-update"), dtype=torch.float32).state_dict()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if value.is_floating_point():
                    value.lerp_(new[name], share)
    elif base != "old":
        model.load_state_dict(load_file(_tuned(base)))
    return model


def _tuned(name: str) -> Path:
    """The weights of the encoder after full tuning on a task; computed once and kept."""
    file = cache_folder() / f"minilm-l6-{name}-{TUNED[name]}.safetensors"
    with locked(file.with_suffix(".lock")):
        if not file.exists():
            from safetensors.torch import save_file

            given = _labelled.__wrapped__(name, 0, PAIRS.texts, PAIRS.held_out)
            model = given.build("old")
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            model.train()
            for _, batch in zip(range(TUNED[name]), given.batches(0, 16), strict=False):
                with autocast():
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            part = file.with_suffix(".part")
            save_file({k: v.contiguous() for k, v in model.backbone.state_dict().items()}, part)
            part.rename(file)
    return file


def decoder(base: str) -> Path:
    """SmolLM2: as released (`old`), or after continued pretraining on dialogue. Updates are made once, one after the
    other, and their reports stored.
    """
    source = model_folder("smollm2")
    if base == "old":
        return source
    names = list(PRETRAINED)
    before = decoder(names[names.index(base) - 1]) if names.index(base) else source
    target = cache_folder() / f"smollm2-friends-{base}"
    with locked(cache_folder() / f"smollm2-friends-{base}.lock"):
        if not target.is_dir():
            model = AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(source)
            steps, rate = PRETRAINED[base]
            report = simulate_update(
                model,
                tokenizer,
                load_corpus("friends"),
                steps=steps,
                learning_rate=rate,
                batch_size=4,
                length=BLOCK,
                other_texts=load_corpus("xsum")[:40],
                bf16=precision() == "bf16",
                seed=names.index(base),
            )
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                built = Path(scratch) / "model"
                model.save_pretrained(built)
                tokenizer.save_pretrained(built)
                built.rename(target)
            STORE.write(f"update_smollm2_{base}", report.to_data())
    return target
