"""Models, data and runs that whoever writes a stored artefact and whoever reads it build alike, to the bit.

Parameters are filled with multiples of 1/256 that numpy's frozen legacy generator draws by name, not with what a
release of torch or transformers would draw: fingerprints of backbones must agree across machines and versions.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

import gatedadapters as ga
from gatedadapters.config import CorruptionConfig, SearchConfig, StreamTrainingConfig, StudyConfig
from gatedadapters.studies import Measured
from gatedadapters.testing.backbones import VOCABULARY, tiny

CLASSES = {"mood": 3, "topic": 2}
EXPERTS = ("mixtral", "gpt_oss", "mamba")  # experts as (out, in), experts as (in, out), weights used without a call
STREAMS: dict[str, dict[str, Any]] = {
    "l2_fisher": {
        "kind": "l2_fisher",
        "probe": {"steps": 2, "batch_size": 4, "fisher_batches": 2, "learning_rate": 1e-3},
        "core": {"share": 0.2},
    },
    "random": {"kind": "random", "core": {"share": 0.05, "granularity": "element"}},
    "lora": {"kind": "lora", "rank": 2},
    "per_task": {
        "kind": "per_task",
        "space": {"name": "small", "paths": [{"kind": "lora", "rank": 2, "at": {"roles": ["q", "up"]}}]},
        "budget": {"fraction": 0.5},
    },
}
TRAINING = StreamTrainingConfig(
    steps=4,
    batch_size=4,
    learning_rate=1e-2,
    head_learning_rate=2e-2,
    device="cpu",
    checkpoint_steps=None,
)
SEARCH: dict[str, Any] = {
    "model": "nowhere",
    "tasks": [{"name": "mood", "train": "mood.csv"}],
    "budget": {"fraction": 0.25},
    "training": {"steps": 100},
}
STUDIES: dict[str, dict[str, Any]] = {
    "sensitivity": {
        "name": "sensitivity",
        "search": SEARCH,
        "factors": {"training.learning_rate": {"values": [1e-3, 2e-3, 4e-3]}},
        "sides": {"gated": {}, "uniform": {}},
        "seeds": [0, 1],
    },
    "optimise": {
        "name": "optimise",
        "mode": "optimise",
        "search": SEARCH,
        "factors": {
            "training.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "budget.fraction": {"low": 0.05, "high": 0.5},
        },
        "seeds": [0],
        "trials": 6,
        "objectives": ["score", "params"],
        "constraints": {"params": 4000},
    },
}


# -- models and batches ------------------------------------------------------------------------------------------------


def exact(model: nn.Module, *, seed: int = 0) -> Any:
    """Fill a model with values that are the same everywhere: gains of norms around 1, all else around 0."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = np.random.RandomState(zlib.crc32(name.encode()) ^ seed)
            values = torch.from_numpy(draw.randint(-64, 65, tuple(parameter.shape)).astype(np.float32)) / 256
            parameter.copy_(values + float(name.endswith("weight") and parameter.dim() == 1))
    return model.eval()


def shallow(family: str, head: str, *, seed: int = 0) -> Any:
    """One block of a tiny model."""
    model, _ = tiny(family, head=head)
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    del blocks[1:]
    model.config.num_hidden_layers = 1
    return exact(model, seed=seed)


def encoder(*, seed: int = 0) -> Any:
    """BERT with one classification head."""
    return shallow("bert", "classification", seed=seed)


def decoder() -> Any:
    """A causal Llama."""
    return shallow("llama", "lm")


def classifier() -> Any:
    """BERT with a head for each of two tasks."""
    backbone = shallow("bert", "base")
    backbone.pooler = None
    model = ga.MultiTaskClassifier(backbone, CLASSES, dropout=0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # nothing random: batches of the whole data set, so that their order does not matter
    return exact(model)


def batch(rows: int = 4) -> dict[str, Tensor]:
    """Token ids (rows, 8), the last example padded."""
    ids = torch.from_numpy(np.random.RandomState(rows).randint(3, VOCABULARY, (rows, 8)))
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


TASK_IDS = torch.tensor([0, 1, 1, 0])  # of the examples of `batch()`


def logits(model: nn.Module, **more: Any) -> Tensor:
    """What a model in evaluation mode computes of `batch()`; of tokens the middle and the last one."""
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**batch(), **more).logits
    return found[:, 4::3] if found.dim() == 3 else found


def chosen(model: nn.Module, every: int = 17) -> dict[str, Tensor]:
    """Flat positions of a few elements of every matrix of the blocks."""
    return {
        name: torch.arange(len(name) % every, parameter.numel(), every)
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and ".layer" in name
    }


# -- trainings that stop in the middle ---------------------------------------------------------------------------------


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Ten quiet steps over all examples at once."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 10,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": None,
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(settings | changes))


def labelled(task: int | None = None, size: int = 8) -> list[dict[str, Any]]:
    """Examples whose label is a function of the first token, of one task or of both in turn."""
    found = []
    for row, tokens in enumerate(batch(size)["input_ids"].tolist()):
        own = row % 2 if task is None else task
        label = (tokens[0] + own) % list(CLASSES.values())[own]
        found.append({"input_ids": tokens, "attention_mask": [1] * 8, "labels": label, "task_ids": own})
    return found


def texts() -> list[dict[str, Any]]:
    """Examples of a causal language model."""
    rows = batch(8)["input_ids"].tolist()
    return [{"input_ids": row, "attention_mask": [1] * 8, "labels": row} for row in rows]


SPACE = ga.SearchSpace.parse(
    {"name": "stored", "paths": [{"kind": "lora", "rank": 3, "at": {"roles": ["q", "v", "up"]}}]}, where="cases"
)
SCHEDULE = ga.Schedule(warmup=0.2, ramp=0.5, prune=0.6)


def search(folder: Path) -> Any:
    """A gated search of two tasks under a budget: the penalty acts from step 4, step 7 prunes."""
    model = classifier()
    ga.attach(model, SPACE, batch() | {"task_ids": TASK_IDS}, tasks=model.tasks)
    return ga.GatedTrainer(
        model,
        arguments(folder),
        train_dataset=labelled(),
        budget=ga.Budget(fraction=0.3),
        schedule=SCHEDULE,
    )


def selective(folder: Path) -> Any:
    """A tuning of elements that were drawn by seed."""
    selection = ga.SelectionConfig(kind="random", include=("q", "v"))
    return ga.SelectiveTrainer(decoder(), arguments(folder), train_dataset=texts(), selection=selection)


def joint(folder: Path) -> Any:
    """A gated search beside a sparse delta, under one budget."""
    model = decoder()
    mask = ga.Mask.build(model, chosen(model, 40))
    ga.attach(model, SPACE, batch())
    delta = ga.apply_mask(model, mask)
    budget = ga.Budget(params=delta.params + 300)
    return ga.GatedTrainer(model, arguments(folder), train_dataset=texts(), budget=budget, schedule=SCHEDULE)


RUNS = {"search": search, "selective": selective, "joint": joint}


def outcome(name: str, model: nn.Module) -> Tensor:
    """Logits at the end of one of `RUNS`."""
    return logits(model, task_ids=TASK_IDS) if name == "search" else logits(model)


# -- streams -----------------------------------------------------------------------------------------------------------


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows of equal length to a batch."""
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def tasks() -> list[ga.Task]:
    """Both tasks of the classifier."""
    return [
        ga.Task(
            name=name,
            train=labelled(index),
            held_out=labelled(index, 5),
            collate=collate,
            classes=tuple("xyz"[:width]),
            heads=(f"heads.{name}",),
        )
        for index, (name, width) in enumerate(CLASSES.items())
    ]


def stream(model: nn.Module, kind: str, folder: Path) -> Any:
    """Run one of `STREAMS`, or go on with it."""
    return ga.run_stream(model, tasks(), STREAMS[kind], training=TRAINING, folder=folder)


# -- studies -----------------------------------------------------------------------------------------------------------


def measure(
    search: SearchConfig,
    side: str,
    perturbations: Sequence[CorruptionConfig] = (),
    *,
    split: str = "test",
    report: Any = None,
) -> Measured:
    """A result in closed form."""
    score = 0.9 - 10 * abs(search.training.learning_rate - 0.002) - 0.1 * (side == "uniform")
    limit = search.limit
    assert limit is not None
    assert limit.fraction is not None
    return Measured({"mood": score - 0.01 * search.training.seed}, (), round(10_000 * limit.fraction), 0.0)


def study(kind: str, journal: Path) -> Any:
    """One of `STUDIES` in a journal."""
    return ga.Study(StudyConfig.parse(STUDIES[kind], where="cases"), storage=journal, measure=measure)
