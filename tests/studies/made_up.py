"""Searches and measures that cost nothing; importable, so that other processes can use them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gatedadapters.config import CorruptionConfig, SearchConfig, StudyConfig
from gatedadapters.config.study import StudySide
from gatedadapters.studies import Measured, Study
from gatedadapters.studies.measured import ReportProgress

SEARCH: dict[str, Any] = {
    "model": "nowhere",
    "tasks": [{"train": "a.csv"}, {"train": "b.csv"}],
    "budget": {"fraction": 0.25},
    "noise": {"kind": "label", "ratio": 0.0},
    "perturbation": {"kind": "typos", "ratio": 0.0},
    "training": {"steps": 100},
}
FACTORS: dict[str, Any] = {
    "penalty.weight": {"low": 0.1, "high": 10, "log": True, "points": 3},
    "noise.ratio": {"values": [0.0, 0.2]},
    "perturbation.ratio": {"values": [0.0, 0.1, 0.3]},
}


def config(**changes: Any) -> StudyConfig:
    data = {
        "name": "made up",
        "search": SEARCH,
        "factors": FACTORS,
        "sides": {"gated": {}, "uniform": {}},
        "seeds": [0, 1],
    }
    return StudyConfig.parse(data | changes, where="test")


def score(search: SearchConfig, side: str, task: int, ratio: float) -> float:
    noise = 0.0 if search.noise is None else search.noise.ratio
    weight = 0.0 if search.penalty is None else search.penalty.weight
    effect = 0.3 * noise + 0.2 * ratio + 0.01 * weight + abs(search.training.learning_rate - 0.002)
    return 0.9 - effect - 0.05 * task - 0.01 * (side == "uniform") - 0.02 * search.training.seed**2


def measure(
    search: SearchConfig,
    side: StudySide,
    perturbations: Sequence[CorruptionConfig] = (),
    *,
    split: str = "test",
    report: ReportProgress | None = None,
) -> Measured:
    """A result in closed form."""
    if report is not None:
        for step in (25, 50, 75):
            report(step, score(search, side, 0, 0.0))

    def scores(ratio: float) -> dict[str, float]:
        return {"a": score(search, side, 0, ratio), "b": score(search, side, 1, ratio)}

    params = 1000 if search.penalty is None else round(1000 / (1 + search.penalty.weight))
    if search.limit is not None and search.limit.fraction is not None:
        params = round(10_000 * search.limit.fraction)
    return Measured(scores(0.0), tuple(scores(p.ratio) for p in perturbations), params, 0.0)


def slow(*args: Any, **kwargs: Any) -> Measured:
    time.sleep(0.05)
    return measure(*args, **kwargs)


def slower(*args: Any, **kwargs: Any) -> Measured:
    time.sleep(0.4)
    return measure(*args, **kwargs)


def run(storage: Path, workers: int) -> None:
    """A whole study in a process of its own, with trials that take a while."""
    Study(config(retries=0), storage=storage, measure=slower).run(workers=workers)


def deadly(marker: Path, search: SearchConfig, *args: Any, **kwargs: Any) -> Measured:
    """Kills its own process the first time that it comes to a certain training."""
    if search.training.seed == 1 and search.penalty is not None and not marker.exists():
        marker.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return slow(search, *args, **kwargs)
