"""Importance-masked tuning as data: model, general text, domain text, selection, training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from gatedadapters.config.base import Config, Count, FileConfig, Place, Seed, found_in
from gatedadapters.config.tasks import TaskConfig


class SelectionConfig(Config):
    """How elements are scored and selected; see `score` and `select`.

    Attributes:
        kind: name of the importance score.
        protect: share of elements that stay frozen.
        keep_general: in place of `protect`, the most that the loss on held-out general text may rise, as a share of it
            (0.01: one percent). The share that keeps to it is searched by short tries.
        tries: most tries of that search.
        try_steps: most optimiser steps of a try; see `TuningTrial`.
        contrast: λ, how much importance for the domain counts against importance in general.
        scope: `global` protects that share of all elements together, `tensor` that share of each tensor.
        include: roles or names of the parameters to choose from. Default: all.
        exclude: roles or names of parameters to leave out of these.
        batches: number of batches, of general and of domain text each, that scores are averaged over; also how many
            batches of held-out general text a try is measured on.
        batch_size: examples in each batch.
        seed: seed of the scores that draw random numbers.
    """

    kind: str = "taylor"
    protect: float = Field(0.95, gt=0, lt=1)
    keep_general: float | None = Field(None, gt=0)
    tries: Count = 6
    try_steps: Count = 100
    contrast: float = Field(1.0, ge=0)
    scope: Literal["global", "tensor"] = "global"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    batches: Count = 32
    batch_size: Count = 8
    seed: Seed = 0

    @model_validator(mode="before")
    @classmethod
    def _read_old_name(cls, data: Any) -> Any:
        """Files of version 0.1 say `core`. A FutureWarning, because Python hides a DeprecationWarning from users of
        the command.
        """
        if not isinstance(data, Mapping) or "core" not in data:
            return data
        if "protect" in data:
            raise ValueError("core is the old name of protect: drop core")
        warnings.warn("SelectionConfig: `core` is now called `protect`; rename the key", FutureWarning, stacklevel=2)
        return {"protect" if key == "core" else key: value for key, value in data.items()}

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.keep_general is not None and "protect" in self.model_fields_set:
            raise ValueError("protect is found from keep_general: drop one of them")
        return self

    @property
    def core(self) -> float:
        """Deprecated name of `protect`."""
        warnings.warn("SelectionConfig.core is now called SelectionConfig.protect", DeprecationWarning, stacklevel=2)
        return self.protect


class TuningConfig(Config):
    """How long and how fast the selected elements of a model are tuned.

    Attributes:
        steps: number of optimiser steps.
        batch_size: texts, or blocks of running text, per step.
        learning_rate: highest learning rate; it decays linearly after the warm-up.
        weight_decay: weight decay of what is tuned.
        warmup: share of the steps in which the learning rate rises.
        max_length: tokens of a block of running text; any other text is cut after so many.
        precision: number format of the forward pass; `bf16` trains under autocast.
        device: `auto` takes the device that accelerate finds.
        seed: seed of data splits, batches, and random numbers in training.
    """

    steps: Count = 200
    batch_size: Count = 8
    learning_rate: float = Field(5e-4, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup: float = Field(0.06, ge=0, le=1)
    max_length: Count = Field(128, gt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Seed = 0


class SelectTrainingConfig(TuningConfig):
    """How long, how fast and by which loss the selected elements are tuned.

    Attributes:
        token_adaptive: let tokens that the model finds hard count less; see `TokenAdaptiveLoss`.
    """

    token_adaptive: bool = False


class SelectConfig(FileConfig):
    """The configuration of `gatedadapters select`, which tunes only what matters little in general.

    Attributes:
        model: a causal language model: a folder, a hub id, or `bundled:NAME`.
        general: text that stands for what the model must not lose; any kind of task but classification.
        domain: text to learn, likewise.
        selection: how elements are scored and selected.
        training: how long and how fast they are tuned.
    """

    version: Literal[1] = 1
    model: Place
    general: TaskConfig
    domain: TaskConfig
    selection: SelectionConfig = SelectionConfig()
    training: SelectTrainingConfig = SelectTrainingConfig()

    def from_folder(self, folder: FilePath) -> Self:
        """A copy whose relative paths are resolved against `folder`."""
        changes = {"general": self.general.from_folder(folder), "domain": self.domain.from_folder(folder)}
        return self.model_copy(update={**changes, "model": found_in(folder, self.model)})
