"""Means with their 95 % t interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean, stdev

_CONFIDENCE = 0.95


@lru_cache
def t_quantile(degrees: int) -> float:
    """The 97.5 % point of Student's t, exact to rounding.

    For whole degrees of freedom, the probability within ±t is a finite sum in θ = atan(t / √degrees). Bisection finds
    the θ at which it is 95 %.

    Args:
        degrees: degrees of freedom, at least 1.

    References:
        Abramowitz and Stegun 1964, Handbook of Mathematical Functions, equations 26.7.3 and 26.7.4.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halvings: more than a float can resolve
        middle = (low + high) / 2
        if _probability_within(middle, degrees) < _CONFIDENCE:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _probability_within(angle: float, degrees: int) -> float:
    """P(|T| < √degrees tan(angle)) for Student's T."""
    cosine = math.cos(angle)
    odd = degrees % 2
    power, term, total = odd, cosine**odd, 0.0
    while power <= degrees - 2:
        total += term
        power += 2
        term *= (power - 1) / power * cosine**2
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % t interval of a mean; nan for fewer than two values."""
    count = len(values)
    return t_quantile(count - 1) * stdev(values) / math.sqrt(count) if count > 1 else math.nan


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds and its 95 % t interval.

    Attributes:
        mean: mean of the values.
        half: half the width of the interval; None for a single value.
        count: number of values.
    """

    mean: float
    half: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of at least one value."""
        return cls(mean(values), half_width(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return self.text()

    def text(self, *, signed: bool = False) -> str:
        """The interval with three decimals, such as `0.738 ± 0.075`; `signed` writes a plus sign, for differences."""
        shown = f"{self.mean:+.3f}" if signed else f"{self.mean:.3f}"
        return shown if self.half is None else f"{shown} ± {self.half:.3f}"
