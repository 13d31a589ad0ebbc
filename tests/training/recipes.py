"""Tiny models, made-up data and short runs that the tests of this folder share, also across processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

import gatedadapters as ga
from gatedadapters.testing.backbones import VOCABULARY, tiny

LENGTH = 8
SPACE = ga.SearchSpace.parse(
    {"gates": {"levels": ["rank"]}, "paths": [{"kind": "lora", "rank": 4, "at": {"roles": ["q", "v", "down"]}}]},
    where="recipes",
)
SOON = ga.Schedule(warmup=0.2, ramp=0.5, prune=0.6)  # of 10 steps: the penalty acts from the 4th, the 6th prunes


def classifier(
    classes: Mapping[str, int] | None = None, *, dropout: float = 0.0, seed: int = 0
) -> ga.MultiTaskClassifier:
    """A tiny BERT with a head per task, nothing attached."""
    classes = classes or {"only": 3}
    backbone, _ = tiny("bert", seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ga.MultiTaskClassifier(backbone, classes, dropout=dropout)
    return with_dropout(model, dropout)


def gated_classifier(classes: Mapping[str, int] | None = None, *, space: Any = SPACE, **options: Any) -> Any:
    """The same with adapters."""
    model = classifier(classes, **options)
    ga.attach(model, space, tasks=model.tasks)
    return model


def gated_causal(*, space: Any = SPACE) -> PreTrainedModel:
    """A tiny Llama that normalises its loss over the accumulated batch, with adapters."""
    model, _ = tiny("llama", head="lm")
    ga.attach(with_dropout(model, 0.0), space)
    return model


def with_dropout(model: Any, share: float) -> Any:
    """The model with this dropout everywhere."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
    return model


def labelled(sizes: list[int], classes: list[int] | None = None, *, seed: int = 0) -> list[dict[str, Any]]:
    """Examples of several tasks, one after the other; the label is a function of the first token."""
    generator = torch.Generator().manual_seed(seed)
    classes = classes or [3] * len(sizes)
    examples = []
    for task, (size, width) in enumerate(zip(sizes, classes, strict=True)):
        for _ in range(size):
            tokens = torch.randint(3, VOCABULARY, (LENGTH,), generator=generator).tolist()
            example = {"input_ids": tokens, "attention_mask": [1] * LENGTH, "labels": (tokens[0] + task) % width}
            examples.append(example | ({"task_ids": task} if len(sizes) > 1 else {}))
    return examples


class Labelled(torch.utils.data.Dataset[dict[str, Any]]):
    """`labelled` as a data set that knows its sizes."""

    def __init__(self, sizes: list[int], classes: list[int] | None = None) -> None:
        self.sizes, self.rows = sizes, labelled(sizes, classes)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def continued(size: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Texts to continue, of which unequally many tokens count."""
    examples = []
    for index, row in enumerate(labelled([size], seed=seed)):
        labels = list(row["input_ids"])
        labels[: 1 + index % (LENGTH - 2)] = [-100] * (1 + index % (LENGTH - 2))
        examples.append({"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "labels": labels})
    return examples


def arguments(folder: Path | str, **changes: Any) -> TrainingArguments:
    """Ten quick, quiet steps on the CPU."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(settings | changes))


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of everything that training changes."""
    adapters = ga.get_adapters(model)
    state = {k: v for k, v in model.state_dict().items() if "gated_adapters" in k or k in adapters.head_names}
    return {key: value.detach().clone() for key, value in state.items()}


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], **tolerance: float) -> None:
    """Bit for bit, or within a tolerance."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if tolerance:
            torch.testing.assert_close(found[key], value, msg=lambda m, key=key: f"{key}: {m}", **tolerance)
        else:
            assert torch.equal(found[key], value), key


class Watch(TrainerCallback):
    """Calls `look(model, optimizer)` just before each optimiser step, and keeps what it returns; also whether a
    Structure was fixed just before and just after it.
    """

    def __init__(self, look: Any = lambda model, optimizer: None) -> None:
        self.look = look
        self.seen: list[Any] = []
        self.fixed_before: list[bool] = []
        self.fixed_after: list[bool] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(self.look(kwargs["model"], kwargs["optimizer"]))
        self.fixed_before.append(ga.get_adapters(kwargs["model"]).structure is not None)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.fixed_after.append(ga.get_adapters(kwargs["model"]).structure is not None)
