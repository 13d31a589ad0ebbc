"""The report of a study: one HTML file, the same as Markdown with pictures, and the best searches as YAML."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from html import escape
from pathlib import Path

import optuna
import yaml
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from gatedadapters.config import StudyConfig
from gatedadapters.config.base import read_yaml
from gatedadapters.config.study import differing
from gatedadapters.errors import ConfigError, StudyError
from gatedadapters.reporting.pages import Heading, Part, Picture, Table, Text, html_page, markdown_page
from gatedadapters.reporting.versions import versions
from gatedadapters.safe_files import check_free, check_writable, whole_folder
from gatedadapters.structure.picture import png_bytes
from gatedadapters.studies import plots, queue, results
from gatedadapters.studies.measured import ACCURACY, metric_of
from gatedadapters.studies.results import MEAN, Curve, CurvePoint

HTML, MARKDOWN, STUDY = "report.html", "report.md", "study.yaml"
_MOST = 20  # best trials that get a file
FILES = frozenset(
    {HTML, MARKDOWN, STUDY, "sensitivity.png", "importance.png", "pareto.png", "parallel.png"}
    | {f"best-{index}.yaml" for index in range(1, _MOST + 1)}
)


def save_report(
    config: StudyConfig, study: optuna.Study, folder: Path, *, overwrite: bool, where: str, unpruned: str | None
) -> Path:
    """Write the report into `folder`, whole or not at all, and return the HTML file; see `Study.report`.

    Args:
        config: the study's configuration.
        study: the study's trials.
        folder: a new folder, or one with an earlier report of this study.
        overwrite: replace the report of another study, too.
        where: names the study in errors.
        unpruned: the reason why no trial could be stopped early, if pruning was asked for.

    Raises:
        StudyError: no trial is complete.
        ArtifactError: the folder holds something else.
    """
    if not results.complete_trials(study):
        raise StudyError(
            "there is nothing to report",
            expected="at least one complete trial",
            got=results.progress(study),
            where=where,
            fix=_advice(study),
        )
    best = results.front(config, study)[:_MOST]
    parts = _parts(config, study, best, unpruned)
    with whole_folder(folder, files=FILES, overwrite=overwrite or _is_report_of(config, folder)) as new:
        for part in parts:
            if isinstance(part, Picture):
                (new / part.file).write_bytes(part.png)
        (new / HTML).write_text(html_page(config.name, parts), encoding="utf-8")
        (new / MARKDOWN).write_text(markdown_page(config.name, parts), encoding="utf-8")
        for index, trial in enumerate(best, 1):
            search = results.search_of(trial, config.search.folder)
            (new / f"best-{index}.yaml").write_text(search.to_yaml(folder.absolute()), encoding="utf-8")
        (new / STUDY).write_text(config.to_yaml(folder.absolute()), encoding="utf-8")
    return folder / HTML


def check_folder(config: StudyConfig, folder: Path, *, overwrite: bool) -> None:
    """Check that `save_report` may write into `folder`; for arguments and errors see there."""
    check_free(folder.resolve(), FILES, overwrite or _is_report_of(config, folder))
    check_writable(folder.parent)


def summary_html(config: StudyConfig, study: optuna.Study) -> str:
    """A study in a notebook: its progress, curves and best trials."""
    head = f"<p><b>Study {escape(config.name)}</b>: {escape(results.progress(study))}</p>"
    if not results.complete_trials(study):
        return head
    return head + "".join(part.as_html() for part in _findings(config, study))


def _is_report_of(config: StudyConfig, folder: Path) -> bool:
    """Whether `folder` holds an earlier report of this study."""
    try:
        earlier = read_yaml(folder / STUDY)
    except ConfigError:
        return False
    mine = yaml.safe_load(config.to_yaml(folder.absolute()))
    return isinstance(earlier, dict) and not differing(earlier, mine)


def _parts(config: StudyConfig, study: optuna.Study, best: Sequence[FrozenTrial], unpruned: str | None) -> list[Part]:
    """Everything in a report, in its order."""
    parts: list[Part] = [Text(config.description)] if config.description else []
    parts += [
        Text(f"Trials: {results.progress(study)}. Every score is taken after pruning."),
        *([] if unpruned is None else [Text(f"No trial was stopped early: {unpruned}.")]),
        *_findings(config, study),
        Heading("Best configurations"),
        Text(_how_the_best_were_chosen(config)),
    ]
    metric = metric_of(config.search)
    percent = " %" if metric is ACCURACY else f" {metric.label}"
    for index, trial in enumerate(best, 1):
        search = results.search_of(trial, config.search.folder)
        values = ", ".join(f"{name} {results.format_value(value)}" for name, value in trial.params.items())
        score = f"{metric.text(results.mean_score(trial.user_attrs['scores']))}{percent}"
        size = f"{trial.user_attrs['params']:,} parameters"
        parts.append(Text(f"best-{index}.yaml, trial {trial.number}: {score}, {size}; {values}"))
        parts.append(Text(search.to_yaml(search.folder).rstrip(), verbatim=True))
    parts += [*_failures(study), Heading("Environment"), _environment(config, study)]
    return [*parts, Heading("The study"), Text(config.to_yaml(config.search.folder).rstrip(), verbatim=True)]


def _findings(config: StudyConfig, study: optuna.Study) -> list[Part]:
    """Curves, importances, the Pareto front and all trials: whichever the study has."""
    parts, metric = list[Part](), metric_of(config.search)
    curves = results.curves(config, study)
    if curves:
        parts += [
            Heading("Sensitivity"),
            Picture(
                "sensitivity.png",
                f"{metric.name.capitalize()} by factor; bands: 95 % t intervals over seeds",
                _png(plots.sensitivity(config, curves)),
            ),
            *_curve_tables(config, curves),
        ]
    found = results.importances(config, study)
    if found:
        rows = [
            [path, *(f"{found[target].get(path, math.nan):.2f}" for target in found)]
            for path in next(iter(found.values()))
        ]
        parts += [
            Heading("Importance"),
            Text("PED-ANOVA: the share of each factor in reaching the best quarter of the trials, by target."),
            Picture("importance.png", "Importance of each factor, by target", _png(plots.importance(found))),
            Table(["factor", *found], rows),
        ]
    elif curves:
        points = "points" if metric is ACCURACY else metric.name
        rows = [[c.factor, c.side, metric.text(c.drop)] for c in curves if c.task == MEAN]
        parts += [
            Heading("Importance"),
            Text(f"One factor at a time: the highest minus the lowest mean score along its curve, in {points}."),
            Table(["factor", "side", points], sorted(rows, key=lambda row: -float(row[2]))),
        ]
    trials = results.complete_trials(study)
    if len(config.objectives) > 1 and config.mode == "optimise":
        front = results.front(config, study)
        rows = [
            [
                str(trial.number),
                *(f"{value:.4g}" for value in trial.values),
                *(results.format_value(trial.params[path]) for path in config.factors),
            ]
            for trial in front
        ]
        picture = _png(plots.pareto(config, trials, front))
        parts += [
            Heading("Pareto front"),
            Picture("pareto.png", "Trials by objective, the front marked", picture),
            Table(["trial", *config.objectives, *config.factors], rows),
        ]
    scored = [(trial.params, results.mean_score(trial.user_attrs["scores"])) for trial in trials]
    picture = _png(plots.parallel(config, scored))
    return [*parts, Heading("All trials"), Picture("parallel.png", "Parallel coordinates, by score", picture)]


def _curve_tables(config: StudyConfig, curves: Sequence[Curve]) -> list[Part]:
    """One table for each factor: values down, sides and tasks across."""
    parts: list[Part] = []
    for path in config.factors:
        own = [curve for curve in curves if curve.factor == path]
        if not own:
            continue
        values = list(dict.fromkeys(point.value for curve in own for point in curve.points))
        at: dict[tuple[int, object], CurvePoint] = {(i, p.value): p for i, c in enumerate(own) for p in c.points}
        rows = []
        for value in values:
            row = [results.format_value(value)]
            for index, curve in enumerate(own):
                point = at.get((index, value))
                row.append("" if point is None else results.format_score(point, metric_of(config.search)))
                if curve.task == MEAN:
                    row.append("" if point is None else f"{point.params:,.0f}")
            rows.append(row)
        header = [path]
        for curve in own:
            header += [f"{curve.side}: {curve.task}", *([f"{curve.side}: parameters"] if curve.task == MEAN else [])]
        parts.append(Table(header, rows))
    seeds = ", ".join(map(str, config.seeds))
    metric = metric_of(config.search)
    what = "Accuracy in per cent" if metric is ACCURACY else metric.label.capitalize()
    return [*parts, Text(f"{what}, mean and 95 % t interval over the seeds {seeds}.")]


def _how_the_best_were_chosen(config: StudyConfig) -> str:
    if config.mode == "sensitivity":
        return (
            "For each side, the setting with the best mean test score over seeds, as its first seed ran it. It was "
            "chosen on test data, so its score is a little optimistic. Run one with: gatedadapters search best-1.yaml"
        )
    return "Chosen on validation data. Run one, and score it on test data, with: gatedadapters search best-1.yaml"


def _failures(study: optuna.Study) -> list[Part]:
    rows = [
        [str(t.number), t.user_attrs.get(queue.KEY, ""), _last_line(t.user_attrs.get(queue.ERROR, ""))]
        for t in results.failed_trials(study)
    ]
    return [Heading("Failed trials"), Table(["trial", "what", "error"], rows)] if rows else []


def _environment(config: StudyConfig, study: optuna.Study) -> Part:
    seconds = sum(trial.user_attrs["seconds"] for trial in results.complete_trials(study))
    rows = [
        *([name, version] for name, version in versions().items()),
        ["optuna", optuna.__version__],
        ["python", platform.python_version()],
        ["machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"],
        ["seeds", ", ".join(map(str, config.seeds))],
        ["training time, all trials", f"{seconds:,.0f} s"],
    ]
    return Table(["", ""], rows)


def _advice(study: optuna.Study) -> str:
    failed = queue.trials_of(study, TrialState.FAIL)
    if failed:
        error = _last_line(failed[-1].user_attrs.get(queue.ERROR, ""))
        return f"correct what made trial {failed[-1].number} fail: {error}"
    return "run the study first"


def _last_line(error: str) -> str:
    """The line of a traceback that names the error."""
    lines = [line for line in error.strip().splitlines() if line.strip()]
    named = [line for line in lines if not line.startswith(" ")]
    return (named or lines or ["unknown"])[-1][:300]


def _png(figure: Figure) -> bytes:
    return png_bytes(figure, dpi=130)
