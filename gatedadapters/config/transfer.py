"""How strongly feed-forward knowledge is weakened, and when; what `gatedadapters transfer` does."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Self

from pydantic import Field, model_validator

from gatedadapters.config.base import Config, found_in
from gatedadapters.config.search import SearchConfig
from gatedadapters.config.space import SearchSpace


class Ramp(Config):
    """A probability that changes over training: `start` until the share `begin` of the steps, then linearly to `end`,
    which is reached at the share `finish`.
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
        """The probability at `progress` in [0, 1] of training."""
        if progress >= self.finish:
            return self.end
        if progress <= self.begin:
            return self.start
        return self.start + (progress - self.begin) / (self.finish - self.begin) * (self.end - self.start)


class WeakeningConfig(Config):
    """What `weaken_knowledge` does to every feed-forward sub-layer while a model trains.

    Attributes:
        mask: p_i, with which each neuron of the inner activation is set to 0.
        drop: p_c, with which a block skips its feed-forward sub-layer.
        rescale: ablation: divide what stays by the share that stays, as ordinary dropout does. The published method
            does not.

    References:
        Trans-PEFT (arXiv 2506.06844, ACL 2025); the defaults are its released recipe.
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
        """Whether a probability changes over training."""
        return isinstance(self.mask, Ramp) or isinstance(self.drop, Ramp)

    def at(self, progress: float) -> tuple[float, float]:
        """(p_i, p_c) at `progress` in [0, 1] of training."""
        mask, drop = (p.at(progress) if isinstance(p, Ramp) else p for p in (self.mask, self.drop))
        return mask, drop


class TransferConfig(SearchConfig):
    """What `gatedadapters transfer` does: train on `model`, test there and on `update`, a later version of it.

    Attributes:
        update: the new base: a folder, a hub id, or `bundled:NAME`.
        adapter: a saved adapter of the old base: it is tested as it is, and its structure is what is trained.
        space: what is trained where no adapter is given, every candidate of it.
        search: let gates choose out of `space` under `budget` instead.
        prefer_transferable: the search of the transfer-trained arm prefers places that hang less on feed-forward
            knowledge (`gatedadapters.transfer.prefer_transferable`).
        weakening: probabilities of knowledge masking and dropping.
        seeds: one training of each arm for each; `training.seed` draws the splits of the tables, for all of them.
        shift_texts: how many test texts the shift of activations is measured on.
    """

    update: str
    adapter: str | None = None
    space: str | SearchSpace = "lora-all-linear"
    search: bool = False
    prefer_transferable: bool = False
    weakening: WeakeningConfig = WeakeningConfig()
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    shift_texts: int = Field(64, gt=0)

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
        return self

    def from_folder(self, folder: FilePath) -> Self:
        """The same with relative paths counted from `folder`."""
        changes = {"update": found_in(folder, self.update), "adapter": self.adapter and found_in(folder, self.adapter)}
        return super().from_folder(folder).model_copy(update=changes)
