"""How a score is judged: by the order in which it puts structures whose loss was measured."""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Protocol

import numpy as np
from scipy.stats import kendalltau

from gatedadapters.structure import Structure


class Predicts(Protocol):
    """What is judged; `gatedadapters.allocation.Placement` is one."""

    def value(self, structure: Structure) -> float:
        """What a structure is worth; of two structures of equal size, the one with the larger value is better."""


@dataclass(frozen=True)
class Judgement:
    """What a score is worth in one regime.

    Attributes:
        tau: Kendall's tau between predicted worth and minus the measured loss.
        pick: the structure with the highest prediction.
        regret: the loss of the pick minus that of the best structure.
        share: the regret as a share of the distance from the mean random structure to the best one; 1 is no better than
            chance. nan where no random structure was measured.
        structures: how many were compared.
    """

    tau: float
    pick: str
    regret: float
    share: float
    structures: int


def predictions(placement: Predicts, structures: Mapping[str, Structure]) -> dict[str, float]:
    """The predicted worth of every structure, by name."""
    return {name: placement.value(structure) for name, structure in structures.items()}


def judge(values: Mapping[str, float], losses: Mapping[str, float]) -> Judgement:
    """Compare predictions with measurements, over the structures that have both.

    Args:
        values: predicted worth by name.
        losses: measured loss by name.
    """
    names = [name for name in losses if name in values]
    best = min(losses[name] for name in names)
    pick = max(names, key=values.__getitem__)  # the first of equals
    by_chance = [losses[name] for name in names if name.startswith("random:")]
    regret = losses[pick] - best
    return Judgement(
        tau=agreement(values, {name: -losses[name] for name in names}),
        pick=pick,
        regret=regret,
        share=regret / (fmean(by_chance) - best) if by_chance else math.nan,
        structures=len(names),
    )


def agreement(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Kendall's tau-b of two rankings of the names that both have; 0 where one of them is constant."""
    names = [name for name in a if name in b]
    tau = float(kendalltau([a[name] for name in names], [b[name] for name in names]).statistic)
    return 0.0 if math.isnan(tau) else tau


def ceiling(losses: Iterable[Mapping[str, float]]) -> float:
    """The noise ceiling: the mean tau between the losses that two seeds measure for the same structures.

    Args:
        losses: by name, one mapping a seed. Two seeds with fewer than three structures in common are left out.
    """
    pairs = [(a, b) for a, b in itertools.combinations(losses, 2) if len(a.keys() & b.keys()) > 2]
    return fmean(agreement(a, b) for a, b in pairs) if pairs else math.nan


def packed(losses: np.ndarray[Any, Any]) -> str:
    """Losses of single texts as text: float16, little-endian, base64."""
    return base64.b64encode(losses.astype("<f2").tobytes()).decode("ascii")


def unpacked(text: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The inverse of `packed`, up to the rounding."""
    return np.frombuffer(base64.b64decode(text), dtype="<f2").astype(np.float32)
