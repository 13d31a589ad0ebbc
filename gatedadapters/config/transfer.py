"""Weakening of feed-forward knowledge, and the configuration of `gatedadapters transfer`."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated, Self

from pydantic import Field, model_validator

from gatedadapters.config.base import Config, Count, Place, Seed, found_in
from gatedadapters.config.search import SearchConfig
from gatedadapters.config.space import SearchSpace


class Ramp(Config):
    """A probability that changes linearly over training.

    Attributes:
        start: the probability until `begin`.
        end: the probability from `finish` on.
        begin, finish: when the change begins and ends, as shares of the steps.
    """

    start: float = Field(0.0, ge=0, lt=1)
    end: float = Field(ge=0, lt=1)
    begin: float = Field(0.0, ge=0, le=1)
    finish: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Ramp:
        if self.begin > self.finish:
            raise ValueError("expected begin <= finish")
        return self

    def at(self, progress: float) -> float:
        """The probability at `progress` in [0, 1] of the steps."""
        if progress >= self.finish:
            return self.end
        if progress <= self.begin:
            return self.start
        return self.start + (progress - self.begin) / (self.finish - self.begin) * (self.end - self.start)


class WeakeningConfig(Config):
    """How `weaken_knowledge` disturbs every feed-forward sub-layer while a model trains.

    Attributes:
        mask: p_i, the probability that a neuron of the inner activation is set to 0.
        drop: p_c, the probability that a block skips its feed-forward sub-layer.
        rescale: whether to divide what stays by the share that stays, as ordinary dropout does. The published method
            does not; this is for ablations.

    References:
        Trans-PEFT (arXiv 2506.06844, ACL 2025). The defaults are those of its released code.
    """

    mask: float | Ramp = Field(0.0)
    drop: float | Ramp = Field(0.1)
    rescale: bool = False

    @model_validator(mode="after")
    def _probabilities(self) -> WeakeningConfig:
        for name, value in (("mask", self.mask), ("drop", self.drop)):
            if not isinstance(value, Ramp) and not 0 <= value < 1:
                raise ValueError(f"{name} is a probability in [0, 1), got {value}")
        return self

    @property
    def scheduled(self) -> bool:
        """Whether one of the probabilities changes over training."""
        return isinstance(self.mask, Ramp) or isinstance(self.drop, Ramp)

    def at(self, progress: float) -> tuple[float, float]:
        """(p_i, p_c) at `progress` in [0, 1] of the steps."""
        mask, drop = (p.at(progress) if isinstance(p, Ramp) else p for p in (self.mask, self.drop))
        return mask, drop


class TransferConfig(SearchConfig):
    """The configuration of `gatedadapters transfer`, which trains on `model` and tests there and on its update.

    Attributes:
        update: the new base, a later version of `model`: a folder, a hub id, or `bundled:NAME`.
        adapter: a saved adapter of the old base. It is tested as it is, and its structure is the one to train.
        space: the search space. Every candidate of it is trained, unless `adapter` or `search` says otherwise.
        search: whether gates choose out of `space` under `budget`.
        prefer_transferable: whether the search of the transfer-trained arm prefers points that depend less on
            feed-forward knowledge (`gatedadapters.transfer.prefer_transferable`).
        weakening: probabilities of masking and dropping feed-forward knowledge.
        repair: lengths of the repairs on the new base, as shares of `training.steps`. Each is made with labels and
            without, and compared with training anew for as many steps. Empty for none.
        seeds: seeds of training. Each arm is trained once for each. `training.seed` draws the splits of the tables, the
            same for all.
        shift_texts: number of test texts on which the shift of activations is measured and the damage predicted.
    """

    update: Place
    adapter: Place | None = None
    space: str | SearchSpace = "lora-all-linear"
    search: bool = False
    prefer_transferable: bool = False
    weakening: WeakeningConfig = WeakeningConfig()
    repair: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.05, 0.1, 0.25)
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)
    shift_texts: Count = 64

    @model_validator(mode="after")
    def _consistent(self) -> TransferConfig:
        if self.compare:
            raise ValueError("compare belongs to a search, not to a transfer")
        if self.penalty is not None or self.noise is not None or self.perturbation is not None:
            raise ValueError("penalty, noise and perturbation belong to a search or a study, not to a transfer")
        if self.search and self.adapter is not None:
            raise ValueError("give either search: true or an adapter whose structure is trained")
        if self.adapter is not None and self.changed_fields({"space"}):
            raise ValueError("give either a space or an adapter whose structure is trained")
        if not self.search and (unread := self.changed_fields({"budget", "schedule"})):
            raise ValueError(
                f"{' and '.join(unread)}: what a search keeps and when; without search: true, all is trained"
            )
        if self.prefer_transferable and not self.search:
            raise ValueError("prefer_transferable is about what a search keeps: it needs search: true")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds must differ")
        if len(set(self.repair)) != len(self.repair):
            raise ValueError("repair: shares must differ")
        return self

    def from_folder(self, folder: FilePath) -> Self:
        """A copy whose relative paths are resolved against `folder`."""
        changes = {"update": found_in(folder, self.update), "adapter": self.adapter and found_in(folder, self.adapter)}
        return super().from_folder(folder).model_copy(update=changes)
