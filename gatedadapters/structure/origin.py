"""What saved adapters say of their base, their tasks and their training, beside the fingerprint and the structure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field

from gatedadapters.config.base import Config, Count, Place
from gatedadapters.config.tasks import Kind
from gatedadapters.runtime.sharding import class_name

ORIGIN = "origin"
"""The key of the origin in `structure.json`."""

_GENERATE = ("ForCausalLM", "LMHeadModel")


class OriginTask(Config):
    """One task of saved adapters.

    Attributes:
        name: of the task.
        kind: of the task.
        labels: names of the classes, in the order of the outputs; of choices, those of every question.
        text: column of the text in the table that was learned from.
        pair: column of the second text; None where there is none.
        metrics: scores on held-out data, by name.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...] = ()
    text: str = "text"
    pair: str | None = None
    metrics: dict[str, float] = Field(default_factory=dict)


class Origin(Config):
    """Where saved adapters come from, and what they need beside the weights to predict.

    Attributes:
        base_model_name_or_path: the backbone: a folder, the id of a model on the hub, or `bundled:NAME`.
        revision: commit of the model on the hub, where it is known.
        tokenizer: the tokenizer, named likewise; None is the backbone's.
        task_type: the pipeline of transformers that serves the tasks.
        tasks: the tasks, in the order of the task ids.
        pooling: how a `MultiTaskClassifier` pools hidden states.
        max_length: tokens after which texts were cut in training.
        training: how they were trained: steps, rates and the like.
    """

    base_model_name_or_path: Place | None = None
    revision: str | None = None
    tokenizer: Place | None = None
    task_type: Literal["text-classification", "text-generation"] | None = None
    tasks: tuple[OriginTask, ...] = ()
    pooling: Literal["mean", "first"] | None = None
    max_length: Count | None = None
    training: dict[str, str | int | float] = Field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, tasks: tuple[str, ...]) -> Self:
        """What a model of transformers tells of itself; an empty origin for any other model.

        Args:
            model: the model.
            tasks: names of the adapters' tasks.
        """
        config = getattr(model, "config", None)
        name = getattr(config, "name_or_path", None)
        base = named(name) if isinstance(name, str) and name else None
        labels = getattr(model, "labels", None)
        if isinstance(labels, dict):  # a MultiTaskClassifier
            known = tuple(OriginTask(name=n, kind="classification", labels=own) for n, own in labels.items())
            pooling = getattr(model, "pooling", None)
            return cls(base_model_name_or_path=base, task_type="text-classification", tasks=known, pooling=pooling)
        kind = class_name(model)
        if kind.endswith("ForSequenceClassification"):
            classes = tuple(str(config.id2label[index]) for index in range(len(config.id2label)))  # type: ignore[union-attr]
            known = tuple(OriginTask(name=n, kind="classification", labels=classes) for n in tasks)
            return cls(base_model_name_or_path=base, task_type="text-classification", tasks=known)
        if kind.endswith(_GENERATE):
            known = tuple(OriginTask(name=n, kind="text") for n in tasks)
            return cls(base_model_name_or_path=base, task_type="text-generation", tasks=known)
        return cls(base_model_name_or_path=base)


_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def has_id_form(name: str) -> bool:
    """Whether this could be the id of a repository on the hub."""
    return _ID.fullmatch(name) is not None


def is_hub_id(name: str) -> bool:
    """Whether this can only be the id of a repository on the hub: it has the form of one, and no such path exists."""
    return has_id_form(name) and not Path(name).exists()


def named(model: str) -> str:
    """The name of a model that holds from every folder: a path becomes absolute, an id stays."""
    return str(Path(model).absolute()) if Path(model).exists() else model


def commit_of(model: str) -> str | None:
    """The commit that the hub's cache holds of a model, by its id; None if it is not from there, or not known."""
    if Path(model).exists() or model.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json")
    folder = Path(found).parent if isinstance(found, str) else None
    return folder.name if folder is not None and folder.parent.name == "snapshots" else None
