"""How strongly feed-forward knowledge is weakened, and when."""

from __future__ import annotations

from pydantic import Field, model_validator

from gatedadapters.config.base import Config


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
