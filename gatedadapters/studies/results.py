"""Results of a study, read from its trials: curves with intervals, importances of factors, the best trials."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, Trial, TrialState

from gatedadapters.config import CorruptionConfig, SearchConfig, StudyConfig
from gatedadapters.config.study import PERTURBATION, Objective, StudySide, Value, value_of
from gatedadapters.reporting.intervals import half_width
from gatedadapters.reporting.tables import format_table
from gatedadapters.studies import queue
from gatedadapters.studies.cells import Cell, cells, perturbation_key
from gatedadapters.studies.measured import ACCURACY, Measured, Metric, metric_of

MEAN = "mean"
_FEWEST_TRIALS = 8  # with fewer, importances mean nothing


@dataclass(frozen=True)
class CurvePoint:
    """The score at one value of a factor.

    Attributes:
        value: the value of the factor.
        score: mean accuracy or loss over seeds.
        half: half the width of its 95 % t interval; nan for one seed.
        seeds: number of seeds.
        params: mean number of parameters kept.
    """

    value: Value
    score: float
    half: float
    seeds: int
    params: float


@dataclass(frozen=True)
class Curve:
    """The scores of one side over the values of one factor.

    Attributes:
        factor: dotted path.
        side: gated, uniform or full.
        task: name of a task, or `mean` for the mean over tasks.
        points: one for each value, in the order of the values.
    """

    factor: str
    side: StudySide
    task: str
    points: tuple[CurvePoint, ...]

    @property
    def drop(self) -> float:
        """The highest score minus the lowest."""
        scores = [point.score for point in self.points]
        return max(scores) - min(scores)


# -- one trial ---------------------------------------------------------------------------------------------------------


def mean_score(scores: Mapping[str, float]) -> float:
    """Mean over tasks."""
    return fmean(scores.values())


def average_over_seeds(found: Sequence[Measured]) -> Measured:
    """One result from those of several seeds: mean scores and parameters, total seconds."""

    def average(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {task: fmean(part[task] for part in parts) for task in parts[0]}

    return Measured(
        average([m.scores for m in found]),
        tuple(average(parts) for parts in zip(*(m.perturbed for m in found), strict=True)),
        round(fmean(m.params for m in found)),
        sum(m.seconds for m in found),
    )


def objectives(measured: Measured, metric: Metric) -> dict[Objective, float]:
    """The values that an optimisation can use: `score`, `params` and, with a perturbation, the robustness `gap`."""
    found: dict[Objective, float] = {"score": mean_score(measured.scores), "params": float(measured.params)}
    if measured.perturbed:
        found["gap"] = metric.sign * (found["score"] - mean_score(measured.perturbed[0]))
    return found


def store_result(
    trial: Trial, search: SearchConfig, side: StudySide, perturbations: Sequence[CorruptionConfig], measured: Measured
) -> None:
    """Store the search and the whole result of a trial in its user attributes."""
    by_key = dict(zip(map(perturbation_key, perturbations), measured.perturbed, strict=True))
    written = search.as_written(exclude_unset=True, exclude_none=True)  # another machine may read it
    if not isinstance(search.space, str):  # a path's kind is a default of its class, which exclude_unset would drop
        written["space"] = search.space.model_dump(mode="json", exclude_none=True)
    attributes = {
        "search": written,
        "side": side,
        "scores": measured.scores,
        "perturbed": by_key,
        "params": measured.params,
        "seconds": round(measured.seconds, 2),
    }
    for name, value in attributes.items():
        trial.set_user_attr(name, value)


def search_of(trial: FrozenTrial, folder: Path | None = None) -> SearchConfig:
    """The search that a trial ran, ready to run again; its relative paths count from `folder`."""
    return SearchConfig.read(trial.user_attrs["search"], folder, where=f"trial {trial.number}")


def robustness_gap(trial: FrozenTrial, metric: Metric) -> float:
    """How much worse the score is under the first perturbation."""
    first: Mapping[str, float] = next(iter(trial.user_attrs["perturbed"].values()))
    return metric.sign * (mean_score(trial.user_attrs["scores"]) - mean_score(first))


def metrics(trial: FrozenTrial) -> dict[str, float]:
    """The results of a complete trial by TensorBoard tag."""
    attrs = trial.user_attrs
    found = {
        "score": mean_score(attrs["scores"]),
        **{f"score/{task}": value for task, value in attrs["scores"].items()},
    }
    perturbed = {f"perturbed/{key}": mean_score(scores) for key, scores in attrs["perturbed"].items()}
    return {**found, **perturbed, "params": float(attrs["params"]), "seconds": float(attrs["seconds"])}


# -- all trials --------------------------------------------------------------------------------------------------------


def complete_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials with a result."""
    return queue.trials_of(study, TrialState.COMPLETE)


def failed_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that failed, without those that do not count as failures."""
    return [t for t in queue.trials_of(study, TrialState.FAIL) if queue.UNCOUNTED not in t.user_attrs]


def progress(study: optuna.Study) -> str:
    """How many trials are in each state, such as `14 complete, 2 running, 1 failed`."""
    counts = {state: len(queue.trials_of(study, state)) for state in TrialState}
    failed = len(failed_trials(study))
    parts = [f"{counts[TrialState.COMPLETE]} complete"]
    others = {TrialState.PRUNED: "pruned", TrialState.RUNNING: "running", TrialState.WAITING: "waiting"}
    parts += [f"{counts[state]} {word}" for state, word in others.items() if counts[state]]
    return ", ".join([*parts, *([f"{failed} failed"] if failed else [])])


def scored_cells(config: StudyConfig, study: optuna.Study) -> Iterator[tuple[Cell, Mapping[str, float], FrozenTrial]]:
    """Every cell of a sensitivity study that has a result, with its scores by task and its trial."""
    done = {trial.user_attrs[queue.KEY]: trial for trial in complete_trials(study) if queue.KEY in trial.user_attrs}
    for cell in cells(config):
        trial = done.get(cell.training)
        if trial is None:
            continue
        if cell.perturbation is None:
            yield cell, trial.user_attrs["scores"], trial
        else:
            found = trial.user_attrs["perturbed"].get(perturbation_key(cell.perturbation))
            if found is not None:
                yield cell, found, trial


def curves(config: StudyConfig, study: optuna.Study) -> list[Curve]:
    """See `Study.curves`. In a grid, each point is the mean over all values of the other factors."""
    if config.mode != "sensitivity":
        return []
    everything = list(scored_cells(config, study))
    tasks = list(dict.fromkeys(task for _, scores, _ in everything for task in scores))
    found = []
    for path, factor in config.factors.items():
        for side in config.sides_of(path):
            start = value_of(config.search_of(side, {}), path)
            by_value: dict[Value, dict[int, list[tuple[Mapping[str, float], int]]]] = {}
            for cell, scores, trial in everything:
                value = _value_on_curve(config, cell, path, start)
                if cell.side == side and value is not None:
                    entry = (scores, trial.user_attrs["params"])
                    by_value.setdefault(value, {}).setdefault(cell.seed, []).append(entry)
            order = {value: index for index, value in enumerate(factor.grid())}
            values = sorted(by_value, key=lambda v: (float(v) if _is_number(v) else 0.0, order.get(v, -1)))
            for task in [MEAN, *tasks] if len(tasks) > 1 else [MEAN]:
                points = tuple(_curve_point(value, by_value[value], task) for value in values)
                if points:
                    found.append(Curve(path, side, task, points))
    return found


def _value_on_curve(config: StudyConfig, cell: Cell, path: str, start: Value | None) -> Value | None:
    """The value of factor `path` in a cell; None if the cell is not on the factor's curve."""
    if config.design == "grid":
        return cell.assignment.get(path)
    if not cell.assignment:
        return start
    return cell.assignment[path] if set(cell.assignment) == {path} else None


def _curve_point(value: Value, by_seed: Mapping[int, list[tuple[Mapping[str, float], int]]], task: str) -> CurvePoint:
    def score(scores: Mapping[str, float]) -> float:
        return mean_score(scores) if task == MEAN else scores[task]

    seeds = [fmean(score(scores) for scores, _ in entries) for entries in by_seed.values()]
    params = fmean(size for entries in by_seed.values() for _, size in entries)
    return CurvePoint(value, fmean(seeds), half_width(seeds), len(seeds), params)


def importances(config: StudyConfig, study: optuna.Study) -> dict[str, dict[str, float]]:
    """The share of each factor in reaching the best quarter of the trials, by target (`score`, `params`, `gap`).

    Empty for fewer than 8 trials. Also empty for a sensitivity study of one factor at a time: its curves show the same.

    References:
        Watanabe, Bansal, Hutter 2023, PED-ANOVA, arXiv 2304.10255.
    """
    if config.mode == "sensitivity" and config.design == "one_factor":
        return {}
    trials = [trial for trial in complete_trials(study) if "scores" in trial.user_attrs]
    names = {name for trial in trials for name in trial.params}
    params = [path for path in config.factors if path in names and not path.startswith(PERTURBATION)]
    if len(trials) < _FEWEST_TRIALS or not params:
        return {}
    metric = metric_of(config.search)
    targets: dict[str, Callable[[FrozenTrial], float]] = {
        "score": lambda trial: (
            -metric.sign * mean_score(trial.user_attrs["scores"])
        ),  # the evaluator looks for low values
        "params": lambda trial: float(trial.user_attrs["params"]),
    }
    if all(trial.user_attrs["perturbed"] for trial in trials):
        targets["gap"] = lambda trial: robustness_gap(trial, metric)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluator warns at every call that it looks for low values
        for name, target in targets.items():
            if len({target(trial) for trial in trials}) > 1:
                share = get_param_importances(
                    study, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25), params=params, target=target
                )
                found[name] = {path: float(value) for path, value in share.items()}
    return found


def front(config: StudyConfig, study: optuna.Study) -> list[FrozenTrial]:
    """See `Study.front`. For a sensitivity study: the best setting of each side, by its mean score over seeds."""
    if config.mode == "sensitivity":
        return _best_settings(config, study)
    feasible = [t for t in complete_trials(study) if all(value <= 0 for value in t.constraints.values())]
    signs = [metric_of(config.search).sign if name == "score" else -1 for name in config.objectives]

    def values(trial: FrozenTrial) -> list[float]:
        return [sign * value for sign, value in zip(signs, trial.values, strict=True)]

    def beats(one: FrozenTrial, other: FrozenTrial) -> bool:
        a, b = values(one), values(other)
        return a != b and all(x >= y for x, y in zip(a, b, strict=True))

    best = [trial for trial in feasible if not any(beats(other, trial) for other in feasible)]
    return best[:1] if len(config.objectives) == 1 else best


def _best_settings(config: StudyConfig, study: optuna.Study) -> list[FrozenTrial]:
    """For each side, the trial of the first seed of its best setting."""
    sign, found = metric_of(config.search).sign, []
    for side in config.sides:
        by_setting: dict[str, list[FrozenTrial]] = {}
        for cell, _, trial in scored_cells(config, study):
            if cell.side == side and cell.perturbation is None:
                by_setting.setdefault(repr(sorted(cell.assignment.items())), []).append(trial)
        if by_setting:
            best = max(
                by_setting.values(),
                key=lambda trials: sign * fmean(mean_score(t.user_attrs["scores"]) for t in trials),
            )
            found.append(best[0])
    return found


# -- as text -----------------------------------------------------------------------------------------------------------


def study_table(config: StudyConfig, study: optuna.Study) -> str:
    """The curves of a sensitivity study, or the best trials of an optimisation, as plain text."""
    metric = metric_of(config.search)
    what = "score, % (95 %)" if metric is ACCURACY else f"{metric.name} (95 %)"
    if config.mode == "sensitivity":
        rows = [
            [
                curve.factor,
                curve.side,
                format_value(point.value),
                format_score(point, metric),
                str(point.seeds),
                f"{point.params:,.0f}",
            ]
            for curve in curves(config, study)
            if curve.task == MEAN
            for point in curve.points
        ]
        return format_table(["factor", "side", "value", what, "seeds", "parameters"], rows)
    rows = [
        [str(trial.number), *(f"{v:.4g}" for v in trial.values), *(format_value(v) for v in trial.params.values())]
        for trial in front(config, study)
    ]
    return format_table(["trial", *config.objectives, *config.factors], rows) if rows else "no feasible trial yet"


def format_score(point: CurvePoint, metric: Metric) -> str:
    """The score as people read it, with the half-width of its interval."""
    return metric.text(point.score) + ("" if math.isnan(point.half) else f" ± {metric.text(point.half)}")


def format_value(value: Any) -> str:
    """The value of a factor."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(value: Value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
