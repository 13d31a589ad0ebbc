"""The pictures in the report of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial

from gatedadapters.config import StudyConfig
from gatedadapters.config.study import PENALTY
from gatedadapters.studies.measured import ACCURACY, Metric, metric_of
from gatedadapters.studies.results import MEAN, Curve

_COLOURS = {"gated": "#1f5fa6", "uniform": "#d9822b", "full": "#5b8c3e"}
_NAMES = {"gated": "gated structure", "uniform": "uniform LoRA", "full": "full fine-tuning"}
_INK, _FAINT = "#22303c", "#8b949c"
_TITLES = {
    "penalty.weight": "sparsity weight λ",
    "noise.ratio": "noise ratio",
    "perturbation.ratio": "perturbation ratio",
}
_OBJECTIVES = {"score": "score", "params": "parameters kept", "gap": "robustness gap"}


def sensitivity(config: StudyConfig, curves: Sequence[Curve], task: str = MEAN) -> Figure:
    """Score by factor, one panel for each factor and one colour for each side.

    Bands are 95 % intervals over seeds. A factor of the penalty has a second panel, with the parameters kept.

    Args:
        config: the study's configuration.
        curves: the curves to draw, see `Study.curves`.
        task: name of a task, or `mean`.
    """
    metric = metric_of(config.search)
    factors = [path for path in config.factors if any(c.factor == path and c.task == task for c in curves)]
    panels = [(path, kept) for path in factors for kept in ((False, True) if path.startswith(PENALTY) else (False,))]
    figure = Figure(figsize=(3.6 * len(panels), 3.3), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    scores = [place for place, (_, kept) in zip(axes, panels, strict=True) if not kept]
    for place in scores[1:]:
        place.sharey(scores[0])
    for place, (path, kept) in zip(axes, panels, strict=True):
        for curve in (c for c in curves if c.factor == path and c.task == task):
            _draw(place, curve, metric, kept=kept)
        if config.factors[path].log:
            place.set_xscale("log")
        place.set_xlabel(_title(config, path))
        place.set_ylabel("parameters kept" if kept else metric.label)
        if kept:
            place.set_ylim(bottom=0)
        _plain(place)
    handles, labels = scores[0].get_legend_handles_labels()
    for place in scores[1:]:
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True):
            if label not in labels:
                handles, labels = [*handles, handle], [*labels, label]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw(place: Axes, curve: Curve, metric: Metric, *, kept: bool) -> None:
    numbers = all(isinstance(p.value, (int, float)) and not isinstance(p.value, bool) for p in curve.points)
    x: list[Any] = [p.value if numbers else str(p.value) for p in curve.points]
    y = np.array([p.params if kept else metric.unit * p.score for p in curve.points])
    colour = _COLOURS[curve.side]
    place.plot(x, y, marker="o", markersize=4, color=colour, label=_NAMES[curve.side])
    half = np.array([0.0 if kept or math.isnan(p.half) else metric.unit * p.half for p in curve.points])
    if half.any():
        most = 100 if metric is ACCURACY else None
        place.fill_between(x, (y - half).clip(0), (y + half).clip(max=most), color=colour, alpha=0.13, linewidth=0)


def importance(found: Mapping[str, Mapping[str, float]]) -> Figure:
    """Importance of each factor as bars, one panel for each target."""
    figure = Figure(figsize=(3.6 * len(found), 0.4 * max(map(len, found.values())) + 1.2), layout="constrained")
    for place, (target, shares) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        names = list(shares)[::-1]
        place.barh(names, [shares[name] for name in names], color=_COLOURS["gated"])
        place.set_xlabel(f"importance for {_OBJECTIVES[target]}")
        _plain(place)
    return figure


def pareto(config: StudyConfig, trials: Sequence[FrozenTrial], best: Sequence[FrozenTrial]) -> Figure:
    """Every trial by its first two objectives, with the front marked; colours show a third objective."""
    first, second = config.objectives[:2]
    figure = Figure(figsize=(5.2, 3.8), layout="constrained")
    place = figure.subplots()
    third = [trial.values[2] for trial in trials] if len(config.objectives) > 2 else None
    dots = place.scatter(
        [t.values[1] for t in trials],
        [t.values[0] for t in trials],
        s=26,
        linewidth=0,
        zorder=2,
        **({"c": third, "cmap": "viridis"} if third is not None else {"color": _FAINT}),
    )
    if third is not None:
        figure.colorbar(dots, label=_OBJECTIVES[config.objectives[2]])
    place.scatter(
        [t.values[1] for t in best],
        [t.values[0] for t in best],
        s=70,
        facecolors="none",
        edgecolors=_COLOURS["gated"],
        linewidth=1.6,
        label="Pareto front",
        zorder=3,
    )
    place.set_xlabel(_OBJECTIVES[second])
    place.set_ylabel(_OBJECTIVES[first])
    place.legend(frameon=False, fontsize=8)
    _plain(place)
    return figure


def parallel(config: StudyConfig, rows: Sequence[tuple[Mapping[str, Any], float]]) -> Figure:
    """Parallel coordinates: one line for each (parameters, score), one axis for each parameter; high scores on top."""
    names = [name for name in ("side", *config.factors) if any(name in params for params, _ in rows)]
    scales = {name: _scale(config, name, [params[name] for params, _ in rows if name in params]) for name in names}
    scores = np.array([score for _, score in rows])
    low, high = float(scores.min()), float(scores.max())
    figure = Figure(figsize=(max(5.0, 1.7 * (len(names) + 1)), 3.6), layout="constrained")
    place = figure.subplots()
    colours = colormaps["viridis"]
    metric = metric_of(config.search)
    for params, score in sorted(rows, key=lambda row: metric.sign * row[1]):
        height = (score - low) / (high - low) if high > low else 0.5
        points = [(at, scales[name][0](params[name])) for at, name in enumerate(names) if name in params]
        x, y = zip(*points, (len(names), height), strict=True)
        place.plot(x, y, color=colours(height), alpha=0.75, linewidth=1.2)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
    for at, name in enumerate(names):
        place.axvline(at, color=_FAINT, linewidth=0.8)
        for height, label in scales[name][1]:
            place.text(at + 0.03, height, label, fontsize=7, color=_INK, va="center", bbox=box)
    place.axvline(len(names), color=_FAINT, linewidth=0.8)
    percent = " %" if metric is ACCURACY else ""
    for height, value in ((0.0, low), (1.0, high)):
        place.text(
            len(names) + 0.03,
            height,
            metric.text(value) + percent,
            fontsize=7,
            color=_INK,
            va="center",
        )
    place.set_xticks(range(len(names) + 1), [*(_title(config, name) for name in names), "score"], fontsize=8)
    place.set_yticks([])
    place.set_xlim(-0.1, len(names) + 0.4)
    for side in place.spines.values():
        side.set_visible(False)
    return figure


def _scale(config: StudyConfig, name: str, values: Sequence[Any]) -> tuple[Any, list[tuple[float, str]]]:
    """A function from a value to its height in [0, 1], and the labels of the axis as (height, text)."""
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
        logarithmic = name in config.factors and config.factors[name].log and min(values) > 0
        transform = math.log if logarithmic else float
        low, high = transform(min(values)), transform(max(values))
        span = high - low or 1.0
        ends = [(0.0, f"{min(values):g}"), (1.0, f"{max(values):g}")]
        return (lambda value: (transform(value) - low) / span), ends[: 2 if high > low else 1]
    kinds = sorted({str(v) for v in values})
    heights = {kind: index / max(1, len(kinds) - 1) for index, kind in enumerate(kinds)}
    return (lambda value: heights[str(value)]), [(height, kind) for kind, height in heights.items()]


def _title(config: StudyConfig, path: str) -> str:
    kinds = {"noise.ratio": config.search.noise, "perturbation.ratio": config.search.perturbation}
    kind = kinds.get(path)
    return _TITLES.get(path, path) + (f" ({kind.kind.replace('_', ' ')})" if kind is not None else "")


def _plain(place: Axes) -> None:
    for side in ("top", "right"):
        place.spines[side].set_visible(False)
    place.tick_params(labelsize=8, colors=_INK)
    place.grid(axis="y", color="#e6e8ea", linewidth=0.7)
    place.set_axisbelow(True)
