"""Means with their 95 % t interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom, and that of the normal distribution
_T = (
    *(12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139),
    *(2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963),
    *(2.079614, 2.073873, 2.068658, 2.063899, 2.059539, 2.055529, 2.051831, 2.048407, 2.045230, 2.042272),
)
_Z = 1.959964


def t_quantile(degrees: int) -> float:
    """97.5 % point of Student's t, to five digits after the point.

    References:
        Abramowitz and Stegun 26.7.5, above 30 degrees of freedom.
    """
    if degrees <= len(_T):
        return _T[degrees - 1]
    z = _Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / float(degrees) ** power for power, term in enumerate(terms))


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
