"""What keeps an adapter small: a weight on the L0 penalty, or a budget that is met exactly."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from gatedadapters.config.base import Config
from gatedadapters.errors import BudgetError

Unit = Literal["params", "flops"]


class L0(Config):
    """A penalty: `weight` times the expected share of the candidates' cost that is open.

    The share lies in [0, 1] for every model, so a weight means the same on 6 layers and on 80.

    Attributes:
        weight: factor of the share in the loss.
        unit: the cost that is counted: parameters, or flops per token.

    References:
        Louizos, Welling, Kingma 2018 (arXiv 1712.01312), equation 12, with every gate weighted by the cost of what it
        opens.
    """

    weight: float = Field(ge=0)
    unit: Unit = "params"


class Budget(Config):
    """The most that the final Structure may cost. Give exactly one of `params`, `fraction`, `flops`, `within`.

    Attributes:
        params: number of adapter parameters that are stored.
        fraction: share of the parameters of all candidates, in (0, 1].
        flops: twice the multiply-adds of the adapters in a forward pass, per token.
        within: keep the smallest structure that gains at least `1 - within` of what all candidates gain on held-out
            data. `ga.allocate` and `GatedTrainer` turn it into a number of parameters, by a probe before training.
        per_task: the most that any one task may use, in the unit of the budget (a share with `fraction`).
    """

    added: ClassVar = ("within",)

    params: int | None = Field(None, gt=0, lt=2**63)
    fraction: float | None = Field(None, gt=0, le=1)
    flops: float | None = Field(None, gt=0)
    within: float | None = Field(None, gt=0, lt=1)
    per_task: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        if sum(value is not None for value in (self.params, self.fraction, self.flops, self.within)) != 1:
            raise ValueError("give exactly one of params, fraction, flops, within")
        return self

    @classmethod
    def from_number(cls, text: str, *, where: str) -> Self:
        """Read a budget from one number: `0.25` is a share of the candidates, `40000` a number of parameters.

        Raises:
            ConfigError: `text`, which was given at `where`, is no such number.
        """
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        given = {"fraction": value} if value <= 1 else {"params": value}
        return cls.parse(given, where=f"{where} {text}")

    @property
    def unit(self) -> Unit:
        """The cost that this budget limits."""
        return "flops" if self.flops is not None else "params"

    def resolve(self, dense: float) -> float:
        """The budget in parameters or flops, given the cost of all candidates (`dense`).

        Raises:
            BudgetError: it is relative to a held-out gain that nobody has measured yet.
        """
        if self.within is not None:
            raise BudgetError(
                "this budget becomes a size only after a probe",
                expected="params, fraction or flops",
                got=f"Budget(within={self.within})",
                where="discretize / set_penalty",
                fix="pass it to ga.allocate or GatedTrainer, or take adapters.frontier(batches).within(share)",
            )
        if self.fraction is not None:
            return self.fraction * dense
        return float(self.params if self.params is not None else self.flops or 0.0)

    def resolve_task(self, dense: float) -> float | None:
        """The cap per task in parameters or flops, given the cost of all candidates; None if there is no cap."""
        if self.per_task is None:
            return None
        return self.per_task * dense if self.fraction is not None else self.per_task


Penalty = L0 | Budget


class Schedule(Config):
    """When the penalty acts, as shares of the training steps.

    All of it happens early by default: in the runs measured, steps spent on paths that are dropped cost more than a
    longer search gained.

    Attributes:
        warmup: until here there is no penalty, so that paths, which start at zero, can learn something first.
        ramp: until here the L0 weight or the budget rises to its full strength.
        prune: here the Structure is fixed, and what it keeps trains on without gate noise. None never prunes during
            training.
        rewind: whether `GatedTrainer` starts the learning rate of the weights once more from its peak after the prune.
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
        """Strength of the penalty, 0 to 1, at `progress` in [0, 1] of training."""
        if progress < self.warmup:
            return 0.0
        if progress >= self.ramp:
            return 1.0
        return (progress - self.warmup) / (self.ramp - self.warmup)
