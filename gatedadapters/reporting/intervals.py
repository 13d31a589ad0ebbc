"""Means with their 95 % t interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom
_T = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def t_quantile(degrees: int) -> float:
    """97.5 % point of Student's t."""
    return _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.4 / degrees


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds, and the half-width of its 95 % t interval (None of a single value)."""

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of at least one value."""
        n = len(values)
        half = t_quantile(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else None
        return cls(mean(values), half, n)

    def __str__(self) -> str:
        return self.text()

    def text(self, *, signed: bool = False) -> str:
        """With three decimals; `signed` for differences."""
        shown = f"{self.mean:+.3f}" if signed else f"{self.mean:.3f}"
        return shown if self.half is None else f"{shown} ± {self.half:.3f}"
