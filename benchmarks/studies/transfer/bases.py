"""The bases before and after an update, and how far the update moved them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

import gatedadapters as ga
from benchmarks.common.store import Result
from benchmarks.studies.transfer.cells import STORE, UPDATE, Cell, Setting
from gatedadapters.data import MixedTaskCollator, MixedTaskDataset
from gatedadapters.data.bundled import load_corpus, load_task, model_folder
from gatedadapters.data.bundled.models import cache_folder
from gatedadapters.transfer import activation_shift, simulate_update


def folder_of(name: str) -> Path:
    """A base as `from_pretrained` reads it; the update of SmolLM2 is made once, and its report stored."""
    if name != "smollm2-friends":
        return model_folder(name)
    target = cache_folder() / "smollm2-friends-80"
    if not target.is_dir():
        source = model_folder("smollm2")
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source)
        report = simulate_update(
            model,
            tokenizer,
            load_corpus("friends"),
            steps=80,
            learning_rate=5e-4,
            batch_size=4,
            length=128,
            other_texts=load_corpus("xsum")[:40],
        )
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch) / "model"
            model.save_pretrained(built)
            tokenizer.save_pretrained(built)
            built.rename(target)
        STORE.write(UPDATE, report.to_data())
    return target


def build(cell: Cell, base: str, n_classes: int) -> tuple[nn.Module, Any]:
    """A base under a classification head that depends on the seed alone."""
    folder = folder_of(base)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    set_seed(cell.seed)
    if cell.setting == "smollm2":
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=n_classes, pad_token_id=tokenizer.pad_token_id, dtype=torch.float32
        )
        return model, tokenizer
    backbone = AutoModel.from_pretrained(folder, dtype=torch.float32)
    return ga.MultiTaskClassifier(backbone, {cell.task: n_classes}), tokenizer


class Plain:
    """Batches as a model with one task takes them."""

    def __init__(self, collate: MixedTaskCollator) -> None:
        self.collate = collate

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Without task ids."""
        return self.collate([{k: v for k, v in f.items() if k not in ("task_ids", "token_type_ids")} for f in features])


def unlabelled(data: Sequence[dict[str, Any]], collate: MixedTaskCollator, count: int) -> list[dict[str, Tensor]]:
    """The first examples in batches of 16, without labels."""
    inputs = [{name: data[i][name] for name in ("input_ids", "attention_mask")} for i in range(count)]
    return [collate(inputs[i : i + 16]) for i in range(0, count, 16)]


def premise(setting: Setting, task_name: str) -> Result:
    """How far the update moved the outputs of attention and of feed-forward maps."""
    task = load_task(task_name, train=10, validation=10, test=128, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder_of(setting.old))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data, collate = MixedTaskDataset([task], tokenizer, "test", setting.length), MixedTaskCollator(tokenizer)
    batches = unlabelled(data, collate, 128)
    bases = [AutoModel.from_pretrained(folder_of(name), dtype=torch.float32) for name in (setting.old, setting.new)]
    shift = activation_shift(*bases, batches)
    means = {kind: shift.mean(kind) for kind in ("attention", "feed_forward")}
    return {**means, "points": shift.to_data()}
