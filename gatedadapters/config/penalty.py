"""What holds the adapter small: an L0 weight, or a budget that is met exactly."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from gatedadapters.config.base import Config

Unit = Literal["params", "flops"]


class L0(Config):
    """`weight` times the expected share of the candidates' cost that is open.

    The share lies in [0, 1] whatever the model, so one weight means the same on 6 layers and on 80.

    References:
        Louizos et al. 2018, equation 12, with every gate weighted by the cost it stands for.
    """

    weight: float = Field(ge=0)
    unit: Unit = "params"


class Budget(Config):
    """How much the final Structure may cost; give exactly one of `params`, `fraction`, `flops`.

    Attributes:
        params: adapter parameters stored in the end.
        fraction: share of the dense candidates' parameters, in (0, 1].
        flops: adapter multiply-adds times two, forward, per token.
        per_task: optional cap on what one task uses, in the same unit as the budget (a share with `fraction`).
    """

    params: int | None = Field(None, gt=0)
    fraction: float | None = Field(None, gt=0, le=1)
    flops: float | None = Field(None, gt=0)
    per_task: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        if sum(value is not None for value in (self.params, self.fraction, self.flops)) != 1:
            raise ValueError("give exactly one of params, fraction, flops")
        return self

    @classmethod
    def from_number(cls, text: str, *, where: str) -> Self:
        """A budget from one number: `0.25` is a share of the candidates, `40000` a number of parameters.

        Raises:
            ConfigError: `text`, given at `where`, is no such number.
        """
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        given = {"fraction": value} if value <= 1 else {"params": value}
        return cls.parse(given, where=f"{where} {text}")

    @property
    def unit(self) -> Unit:
        """The cost this budget counts."""
        return "flops" if self.flops is not None else "params"

    def resolve(self, dense: float) -> float:
        """The budget in units of cost, given the cost of all candidates."""
        if self.fraction is not None:
            return self.fraction * dense
        return float(self.params if self.params is not None else self.flops or 0.0)

    def resolve_task(self, dense: float) -> float | None:
        """The cap per task in units of cost, or None."""
        if self.per_task is None:
            return None
        return self.per_task * dense if self.fraction is not None else self.per_task


Penalty = L0 | Budget


class Schedule(Config):
    """When the penalty acts, as shares of the training steps.

    No penalty until `warmup`, so that paths (which start at zero) come to mean something; then the L0 weight or the
    budget ramps until `ramp`; at `prune` the Structure is fixed and the survivors train on without gate noise. All that
    comes early: in the runs measured, steps spent on what is dropped cost more than a longer search brought.
    `prune = None` never prunes during training. With `rewind`, `GatedTrainer` lets the weights' learning rate run
    through its descent once more after the prune.
    """

    warmup: float = Field(0.02, ge=0, le=1)
    ramp: float = Field(0.08, ge=0, le=1)
    prune: float | None = Field(0.1, gt=0, le=1)
    rewind: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> Schedule:
        if not self.warmup <= self.ramp <= (1.0 if self.prune is None else self.prune):
            raise ValueError("expected warmup <= ramp <= prune")
        return self

    def pressure(self, progress: float) -> float:
        """How far the ramp has come, 0 to 1, at `progress` in [0, 1] of training."""
        if progress < self.warmup:
            return 0.0
        if progress >= self.ramp:
            return 1.0
        return (progress - self.warmup) / (self.ramp - self.warmup)
