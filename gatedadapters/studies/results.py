"""What a study found: curves with intervals, importances, the best trials."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, Trial, TrialState

from gatedadapters.config import CorruptionConfig, SearchConfig, StudyConfig
from gatedadapters.config.study import PERTURBATION, Objective, Side, Value, value_of
from gatedadapters.reporting.intervals import t_quantile
from gatedadapters.reporting.tables import format_table
from gatedadapters.studies import queue
from gatedadapters.studies.cells import Cell, cells, perturbation_key
from gatedadapters.studies.measured import Measured

if TYPE_CHECKING:
    from gatedadapters.studies.study import Study

MEAN = "mean"
_FEWEST = 8  # trials below which importances mean nothing


@dataclass(frozen=True)
class Point:
    """One value of a factor.

    Attributes:
        value: of the factor.
        score: mean accuracy over seeds.
        half: half the width of its 95 % t interval; nan of one seed.
        seeds: how many.
        params: mean number of parameters kept.
    """

    value: Value
    score: float
    half: float
    seeds: int
    params: float


@dataclass(frozen=True)
class Curve:
    """Score by value of one factor, on one side, of one task or in the mean over tasks."""

    factor: str
    side: Side
    task: str
    points: tuple[Point, ...]

    @property
    def drop(self) -> float:
        """The best score less the worst."""
        scores = [point.score for point in self.points]
        return max(scores) - min(scores)


def mean(scores: Mapping[str, float]) -> float:
    """Over tasks."""
    return fmean(scores.values())


def averaged(found: Sequence[Measured]) -> Measured:
    """One result out of those of several seeds."""

    def average(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
        return {task: fmean(part[task] for part in parts) for task in parts[0]}

    return Measured(
        average([m.scores for m in found]),
        tuple(average(parts) for parts in zip(*(m.perturbed for m in found), strict=True)),
        round(fmean(m.params for m in found)),
        sum(m.seconds for m in found),
    )


def objectives(measured: Measured) -> dict[Objective, float]:
    """What an optimisation may look at."""
    found: dict[Objective, float] = {"score": mean(measured.scores), "params": float(measured.params)}
    if measured.perturbed:
        found["gap"] = found["score"] - mean(measured.perturbed[0])
    return found


def note(
    trial: Trial, search: SearchConfig, side: Side, perturbations: Sequence[CorruptionConfig], measured: Measured
) -> None:
    """Keep everything of a trial beside its values."""
    by_key = dict(zip(map(perturbation_key, perturbations), measured.perturbed, strict=True))
    asked = search.as_written(exclude_unset=True, exclude_none=True)  # another machine may read it
    if not isinstance(search.space, str):  # what kind a path has is a default of its class
        asked["space"] = search.space.model_dump(mode="json", exclude_none=True)
    kept = {
        "search": asked,
        "side": side,
        "scores": measured.scores,
        "perturbed": by_key,
        "params": measured.params,
        "seconds": round(measured.seconds, 2),
    }
    for name, value in kept.items():
        trial.set_user_attr(name, value)


def search_of(trial: FrozenTrial, folder: Path | None = None) -> SearchConfig:
    """The search that a trial ran, ready to run again; its paths count from `folder`, that of the study's search."""
    return SearchConfig.read(trial.user_attrs["search"], folder, where=f"trial {trial.number}")


def complete(study: optuna.Study) -> list[FrozenTrial]:
    """Trials with a result."""
    return queue.trials_of(study, TrialState.COMPLETE)


def scored(config: StudyConfig, study: optuna.Study) -> Iterator[tuple[Cell, Mapping[str, float], FrozenTrial]]:
    """Every cell of a sensitivity study that has a result, its scores by task, and its trial."""
    done = {trial.user_attrs[queue.KEY]: trial for trial in complete(study) if queue.KEY in trial.user_attrs}
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
    """See `Study.curves`. In a grid each point is the mean over all values of the other factors."""
    if config.mode != "sensitivity":
        return []
    everything = list(scored(config, study))
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
                points = tuple(_point(value, by_value[value], task) for value in values)
                if points:
                    found.append(Curve(path, side, task, points))
    return found


def _value_on_curve(config: StudyConfig, cell: Cell, path: str, start: Value | None) -> Value | None:
    if config.design == "grid":
        return cell.assignment.get(path)
    if not cell.assignment:
        return start
    return cell.assignment[path] if set(cell.assignment) == {path} else None


def _point(value: Value, by_seed: Mapping[int, list[tuple[Mapping[str, float], int]]], task: str) -> Point:
    def score(scores: Mapping[str, float]) -> float:
        return mean(scores) if task == MEAN else scores[task]

    seeds = [fmean(score(scores) for scores, _ in entries) for entries in by_seed.values()]
    params = fmean(size for entries in by_seed.values() for _, size in entries)
    return Point(value, fmean(seeds), half_width(seeds), len(seeds), params)


def half_width(values: Sequence[float]) -> float:
    """Half the width of the 95 % t interval of a mean; nan of one value."""
    n = len(values)
    return t_quantile(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else math.nan


def importances(config: StudyConfig, study: optuna.Study) -> dict[str, dict[str, float]]:
    """Share of each factor in reaching the best quarter of the trials, by target; none of a one-factor sensitivity
    study, whose curves say it, nor of fewer than 8 trials.

    References:
        Watanabe, Bansal, Hutter 2023, PED-ANOVA, arXiv 2304.10255.
    """
    if config.mode == "sensitivity" and config.design == "one_factor":
        return {}
    trials = [trial for trial in complete(study) if "scores" in trial.user_attrs]
    names = {name for trial in trials for name in trial.params}
    params = [path for path in config.factors if path in names and not path.startswith(PERTURBATION)]
    if len(trials) < _FEWEST or not params:
        return {}
    targets: dict[str, Callable[[FrozenTrial], float]] = {
        "score": lambda trial: -mean(trial.user_attrs["scores"]),  # the evaluator looks for low values
        "params": lambda trial: float(trial.user_attrs["params"]),
    }
    if all(trial.user_attrs["perturbed"] for trial in trials):
        targets["gap"] = gap
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says again that it looks for low values
        for name, target in targets.items():
            if len({target(trial) for trial in trials}) > 1:
                share = get_param_importances(
                    study, evaluator=PedAnovaImportanceEvaluator(target_quantile=0.25), params=params, target=target
                )
                found[name] = {path: float(value) for path, value in share.items()}
    return found


def gap(trial: FrozenTrial) -> float:
    """Clean less perturbed score, of the first perturbation."""
    first: Mapping[str, float] = next(iter(trial.user_attrs["perturbed"].values()))
    return mean(trial.user_attrs["scores"]) - mean(first)


def metrics(trial: FrozenTrial) -> dict[str, float]:
    """What a complete trial came to, by tag."""
    attrs = trial.user_attrs
    found = {"score": mean(attrs["scores"]), **{f"score/{task}": value for task, value in attrs["scores"].items()}}
    perturbed = {f"perturbed/{key}": mean(scores) for key, scores in attrs["perturbed"].items()}
    return {**found, **perturbed, "params": float(attrs["params"]), "seconds": float(attrs["seconds"])}


def front(config: StudyConfig, study: optuna.Study) -> list[FrozenTrial]:
    """See `Study.front`; of a sensitivity study the best setting of each side, by its mean over seeds."""
    trials = complete(study)
    if config.mode == "sensitivity":
        return _best_settings(config, study)
    feasible = [trial for trial in trials if all(value <= 0 for value in trial.constraints.values())]
    signs = [1 if name == "score" else -1 for name in config.objectives]

    def values(trial: FrozenTrial) -> list[float]:
        return [sign * value for sign, value in zip(signs, trial.values, strict=True)]

    def beats(one: FrozenTrial, other: FrozenTrial) -> bool:
        a, b = values(one), values(other)
        return a != b and all(x >= y for x, y in zip(a, b, strict=True))

    best = [trial for trial in feasible if not any(beats(other, trial) for other in feasible)]
    return best[:1] if len(config.objectives) == 1 else best


def _best_settings(config: StudyConfig, study: optuna.Study) -> list[FrozenTrial]:
    found = []
    for side in config.sides:
        by_setting: dict[str, list[FrozenTrial]] = {}
        for cell, _, trial in scored(config, study):
            if cell.side == side and cell.perturbation is None:
                by_setting.setdefault(repr(sorted(cell.assignment.items())), []).append(trial)
        if by_setting:
            best = max(by_setting.values(), key=lambda trials: fmean(mean(t.user_attrs["scores"]) for t in trials))
            found.append(best[0])
    return found


def progress(study: Study) -> str:
    """How far it has come, in words."""
    counts = {state: len(queue.trials_of(study.optuna, state)) for state in TrialState}
    failed = [t for t in queue.trials_of(study.optuna, TrialState.FAIL) if queue.SPARED not in t.user_attrs]
    parts = [f"{counts[TrialState.COMPLETE]} complete"]
    others = {TrialState.PRUNED: "pruned", TrialState.RUNNING: "running", TrialState.WAITING: "waiting"}
    parts += [f"{counts[state]} {word}" for state, word in others.items() if counts[state]]
    return ", ".join([*parts, *([f"{len(failed)} failed"] if failed else [])])


def table(config: StudyConfig, study: optuna.Study) -> str:
    """Curves or best trials, for reading."""
    if config.mode == "sensitivity":
        rows = [
            [curve.factor, curve.side, shown(point.value), score_text(point), str(point.seeds), f"{point.params:,.0f}"]
            for curve in curves(config, study)
            if curve.task == MEAN
            for point in curve.points
        ]
        return format_table(["factor", "side", "value", "score, % (95 %)", "seeds", "parameters"], rows)
    rows = [
        [str(trial.number), *(f"{value:.4g}" for value in trial.values), *(shown(v) for v in trial.params.values())]
        for trial in front(config, study)
    ]
    return format_table(["trial", *config.objectives, *config.factors], rows) if rows else "no feasible trial yet"


def score_text(point: Point) -> str:
    """A score in per cent with its interval."""
    return f"{100 * point.score:.1f}" + ("" if math.isnan(point.half) else f" ± {100 * point.half:.1f}")


def shown(value: Any) -> str:
    """A factor's value, for reading."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _is_number(value: Value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
