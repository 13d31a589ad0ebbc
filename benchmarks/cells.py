"""What the studies share: results of single runs as files, and intervals over them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from gatedadapters.reporting.intervals import t_quantile


def store(file: Path, result: dict[str, Any]) -> None:
    """Written whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(part, file)


def read(file: Path) -> dict[str, Any] | None:
    """A stored result, if there is one."""
    return dict(json.loads(file.read_text())) if file.exists() else None


def computed(file: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The stored result, computed now if nobody has."""
    if not file.exists():
        store(file, compute())
    return dict(json.loads(file.read_text()))


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and the half-width of its 95 % t interval: nan of fewer than two values."""
    data = np.array(list(values), dtype=float)
    if len(data) < 2:
        return float(data.mean()) if len(data) else float("nan"), float("nan")
    return float(data.mean()), float(t_quantile(len(data) - 1) * data.std(ddof=1) / len(data) ** 0.5)


def shown(values: Iterable[float], *, times: float = 100, signed: bool = False) -> str:
    """The interval as text, of shares in points; nothing where there are no values."""
    data = list(values)
    if not data:
        return ""
    middle, half = interval(data)
    digits = 1 if times == 100 else 3
    text = f"{times * middle:{'+' if signed else ''}.{digits}f}"
    return text if np.isnan(half) else f"{text} ± {times * half:.{digits}f}"
