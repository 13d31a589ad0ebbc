"""What an update of the base costs an adapter, and which share of that cost transfer training recovers."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

from gatedadapters.artifacts import load_adapters
from gatedadapters.config import WeakeningConfig
from gatedadapters.reporting import html
from gatedadapters.reporting.intervals import Interval, t_quantile
from gatedadapters.reporting.tables import format_table
from gatedadapters.structure.folder import ADAPTER
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import detach, find_heads
from gatedadapters.supernet.supernet import NAME
from gatedadapters.transfer.shift import check_versions
from gatedadapters.transfer.weakening import Weakening, weaken_knowledge

Train = Callable[[nn.Module, int], Adapters]
"""From a base and a seed to adapters that were trained on it, compact and attached."""

ScoreFunction = Callable[[nn.Module], float]
"""From a model with adapters to a score, of which the report is told whether higher or lower is better."""

TRANSFER_TRAINED = "transfer-trained"  # name of the second arm and of its folder; the first is ADAPTER


@dataclass(frozen=True, slots=True)
class TransferScores:
    """The scores of one seed.

    Attributes:
        seed: of the adapters' weights and of training.
        old: an adapter trained on the old base, scored there.
        direct: the same adapter scored on the new base.
        trained_old: an adapter trained on the old base with its knowledge weakened, scored there.
        trained_direct: the same adapter scored on the new base.
        retuned: an adapter trained on the new base, scored there.
    """

    seed: int
    old: float
    direct: float
    trained_old: float
    trained_direct: float
    retuned: float


@dataclass(frozen=True, slots=True)
class Recovery:
    """The share of re-tuning's gain that transfer training reaches without seeing the new base.

    Attributes:
        value: the share; None where it is undefined.
        interval: its 95 % interval; None where the share is undefined.

    The share is undefined if the 95 % interval of re-tuning's gain over seeds reaches 0 or below.
    """

    value: float | None
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        if self.value is None or self.interval is None:
            return "undefined: a single seed, or re-tuning wins no more than seeds differ"
        return f"{self.value:.0%} (95 %: {self.interval[0]:.0%} to {self.interval[1]:.0%})"


@dataclass(frozen=True, slots=True)
class TransferReport:
    """The scores of all seeds.

    Attributes:
        scores: one entry for each seed.
        lower_is_better: whether a score is a loss.
    """

    scores: tuple[TransferScores, ...]
    lower_is_better: bool = False

    @property
    def recovery(self) -> Recovery:
        """(transfer-trained - direct) / (re-tuned - direct), all on the new base."""
        sign = -1.0 if self.lower_is_better else 1.0
        won = [sign * (s.trained_direct - s.direct) for s in self.scores]
        return recovery(won, [sign * (s.retuned - s.direct) for s in self.scores])

    def _rows(self) -> list[list[str]]:
        found = self.scores
        return [
            [ADAPTER, str(Interval.of([s.old for s in found])), str(Interval.of([s.direct for s in found]))],
            [
                TRANSFER_TRAINED,
                str(Interval.of([s.trained_old for s in found])),
                str(Interval.of([s.trained_direct for s in found])),
            ],
            ["re-tuned", "", str(Interval.of([s.retuned for s in found]))],
            [
                "transfer-trained - adapter",
                Interval.of([s.trained_old - s.old for s in found]).text(signed=True),
                Interval.of([s.trained_direct - s.direct for s in found]).text(signed=True),
            ],
        ]

    def table(self) -> str:
        """Mean scores with 95 % intervals, and differences paired by seed."""
        return format_table(["", "old base", "new base"], self._rows()) + f"\n\nrecovery: {self.recovery}"

    def _repr_html_(self) -> str:
        return html.table(["", "old base", "new base"], self._rows(), title=f"recovery: {self.recovery}")

    def to_data(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"scores": [asdict(s) for s in self.scores], "recovery": asdict(self.recovery)}


def transfer_scores(
    old: nn.Module,
    new: nn.Module,
    train: Train,
    score: ScoreFunction,
    *,
    seed: int = 0,
    weakening: WeakeningConfig | None = None,
    total_steps: int | None = None,
    folder: str | Path | None = None,
    train_transferable: Train | None = None,
) -> TransferScores:
    """Train an adapter without and one with weakened knowledge on the old base, and one on the new base. Score them.

    The first two are scored on both bases, the third on the new one.

    Args:
        old: the base before its update, with nothing attached. It is afterwards as it was; each training starts from
            the same heads.
        new: the base after its update; the same holds for it.
        train: attaches adapters to the model it is given, trains them and the heads with a seed, and returns them
            compact and attached.
        score: the score of a model with adapters.
        seed: is passed on to `train`.
        weakening: how the knowledge is weakened; default: the published recipe.
        total_steps: optimiser steps of a training, which a scheduled weakening needs.
        folder: where the first two adapters are stored, in folders named `ADAPTER` and `TRANSFER_TRAINED`.
        train_transferable: replaces `train` where the knowledge is weakened; for example a search that prefers paths
            which transfer.

    Raises:
        LayoutError: the two are not versions of one base; the difference is named.
    """
    check_versions(old, new)
    config = weakening or WeakeningConfig()
    with tempfile.TemporaryDirectory(prefix="gatedadapters-") as scratch:
        home, found = Path(folder or scratch), list[float]()
        for name in (ADAPTER, TRANSFER_TRAINED):
            with as_before(old):
                if name == ADAPTER:
                    adapters = train(old, seed)
                else:
                    with _weakened(old, config, total_steps):
                        adapters = (train_transferable or train)(old, seed)
                found.append(score(old))
                adapters.save(home / name, overwrite=True)
            with as_before(new):
                load_adapters(new, home / name, base="updated")
                found.append(score(new))
    with as_before(new):
        train(new, seed)
        retuned = score(new)
    plain, direct, trained_old, trained_direct = found
    return TransferScores(seed, plain, direct, trained_old, trained_direct, retuned)


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """On leaving this context, detach the model's adapters and restore its heads, so that the next training starts from
    the same weights.
    """
    heads = {name: model.get_parameter(name).detach().clone() for name in find_heads(model, None)}
    try:
        yield
    finally:
        if hasattr(model, NAME):
            detach(model)
        with torch.no_grad():
            for name, value in heads.items():
                parameter = model.get_parameter(name)
                parameter.copy_(value.to(parameter.device))


def evaluate_transfer(
    old: nn.Module,
    new: nn.Module,
    train: Train,
    score: ScoreFunction,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    weakening: WeakeningConfig | None = None,
    total_steps: int | None = None,
    lower_is_better: bool = False,
) -> TransferReport:
    """`transfer_scores` for several seeds; see there for arguments and errors, and `TransferReport` for the rest."""
    scores = tuple(
        transfer_scores(old, new, train, score, seed=seed, weakening=weakening, total_steps=total_steps)
        for seed in seeds
    )
    return TransferReport(scores, lower_is_better)


def recovery(won: Sequence[float], gap: Sequence[float]) -> Recovery:
    """mean(won) / mean(gap) with Fieller's 95 % interval; see `Recovery` for when it is undefined.

    Args:
        won: for each seed, what transfer training gained on the new base.
        gap: for each seed, what re-tuning gained there.

    References:
        Fieller 1954, "Some Problems in Interval Estimation", Journal of the Royal Statistical Society B 16(2).
    """
    n = len(gap)
    if n < 2:
        return Recovery(None, None)
    a, b, t = mean(won), mean(gap), t_quantile(n - 1)
    var_a, var_b = stdev(won) ** 2 / n, stdev(gap) ** 2 / n
    both = sum((x - a) * (y - b) for x, y in zip(won, gap, strict=True)) / (n - 1) / n
    if b <= 0 or t * t * var_b >= b * b:  # the interval of the gap is not wholly above 0
        return Recovery(None, None)
    g, ratio = t * t * var_b / (b * b), a / b
    rest = g * (var_a - both * both / var_b) if var_b else 0.0
    half = t / abs(b) * math.sqrt(max(0.0, var_a - 2 * ratio * both + ratio * ratio * var_b - rest))
    centre = ratio - (g * both / var_b if var_b else 0.0)
    return Recovery(ratio, ((centre - half) / (1 - g), (centre + half) / (1 - g)))


def _weakened(model: nn.Module, config: WeakeningConfig, total_steps: int | None) -> Weakening:
    return weaken_knowledge(model, mask=config.mask, drop=config.drop, rescale=config.rescale, total_steps=total_steps)
