"""The configuration of gates."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from gatedadapters.config.base import Config

Level = Literal["block", "point", "path", "rank"]


class GateConfig(Config):
    """Levels of the gate hierarchy, and constants of the hard-concrete distribution.

    Attributes:
        levels: which things have gates: blocks, points, paths, ranks. A unit is open if all gates above it are.
        temperature: beta, the temperature of the concrete distribution.
        low: gamma, the lower end of the stretched interval.
        high: zeta, the upper end of the stretched interval.
        init: initial log alpha. Near 2 to 3, samples still carry gradient.
        init_spread: standard deviation of log alpha around `init`, which breaks ties.
        epsilon: the uniform noise is drawn from (epsilon, 1 - epsilon).
        prior: how far log alpha starts from `init` for a unit that the evidence before training ranks one standard
            deviation above or below the others; see `GateBank.start_from`.
        shrink: whether, under a budget, gates follow the loss only as far as its evidence agrees between odd and even
            steps.
        stochastic: whether training samples gates; otherwise it uses the deterministic gate, as evaluation does.

    References:
        Louizos, Welling, Kingma 2018 (arXiv 1712.01312), section 3 and appendix: beta = 2/3, gamma = -0.1, zeta = 1.1,
        log alpha kept in [log 1e-2, log 1e2].
    """

    added: ClassVar = ("prior", "shrink")

    levels: tuple[Level, ...] = ("rank",)
    temperature: float = Field(2 / 3, gt=0)
    low: float = Field(-0.1, lt=0)
    high: float = Field(1.1, gt=1)
    init: float = 2.5
    init_spread: float = Field(0.01, ge=0)
    epsilon: float = Field(1e-6, gt=0, lt=0.5)
    stochastic: bool = True
    prior: float = Field(2.0, ge=0)
    shrink: bool = True

    @property
    def bounds(self) -> tuple[float, float]:
        """The range (lowest, highest) that log alpha is clamped to."""
        return math.log(1e-2), math.log(1e2)

    @model_validator(mode="after")
    def _levels_and_range(self) -> GateConfig:
        if not self.levels or len(set(self.levels)) != len(self.levels):
            raise ValueError("levels must name each of block, point, path, rank at most once, and at least one")
        if not self.bounds[0] <= self.init <= self.bounds[1]:
            raise ValueError(f"init must lie in [{self.bounds[0]:.2f}, {self.bounds[1]:.2f}]")
        return self
