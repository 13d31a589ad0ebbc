"""How gates are drawn."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from gatedadapters.config.base import Config

Level = Literal["block", "point", "path", "rank"]


class GateConfig(Config):
    """Constants of the hard-concrete distribution and the levels of the gate hierarchy.

    References:
        Louizos, Welling, Kingma 2018 (arXiv 1712.01312), section 3 and appendix: beta = 2/3, gamma = -0.1, zeta = 1.1,
        log alpha kept in [log 1e-2, log 1e2].
    """

    levels: tuple[Level, ...] = ("rank",)
    temperature: float = Field(2 / 3, gt=0)
    low: float = Field(-0.1, lt=0, description="gamma, the lower end of the stretched interval")
    high: float = Field(1.1, gt=1, description="zeta, the upper end of the stretched interval")
    init: float = Field(2.5, description="initial log alpha; near 2-3 samples still carry gradient")
    init_spread: float = Field(0.01, ge=0, description="standard deviation around `init`, breaking ties")
    epsilon: float = Field(1e-6, gt=0, lt=0.5, description="the uniform noise is drawn in (epsilon, 1 - epsilon)")
    stochastic: bool = Field(True, description="False: training, too, uses the deterministic gate")

    @property
    def bounds(self) -> tuple[float, float]:
        """Range that log alpha is kept in."""
        return math.log(1e-2), math.log(1e2)

    @model_validator(mode="after")
    def _levels_and_range(self) -> GateConfig:
        if not self.levels or len(set(self.levels)) != len(self.levels):
            raise ValueError("levels must name each of block, point, path, rank at most once, and at least one")
        if not self.bounds[0] <= self.init <= self.bounds[1]:
            raise ValueError(f"init must lie in [{self.bounds[0]:.2f}, {self.bounds[1]:.2f}]")
        return self
