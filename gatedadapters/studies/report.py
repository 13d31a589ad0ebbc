"""A study for reading: one self-contained HTML file, Markdown with pictures, the best searches as YAML."""

from __future__ import annotations

import base64
import html
import io
import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
import yaml
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState

from gatedadapters.config.study import differing
from gatedadapters.errors import StudyError
from gatedadapters.reporting.versions import versions
from gatedadapters.safe_files import whole_folder
from gatedadapters.studies import plots, queue, results
from gatedadapters.studies.results import MEAN, Curve, Point

if TYPE_CHECKING:
    from gatedadapters.studies.study import Study

HTML, MARKDOWN, STUDY = "report.html", "report.md", "study.yaml"
_MOST = 20  # best trials that get a file
FILES = frozenset(
    {HTML, MARKDOWN, STUDY, "sensitivity.png", "importance.png", "pareto.png", "parallel.png"}
    | {f"best-{index}.yaml" for index in range(1, _MOST + 1)}
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22303c; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0 }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e1e4e7; text-align: left; vertical-align: top }
pre { background: #f5f6f7; padding: .8rem; overflow-x: auto; font-size: 12px }
img { max-width: 100% }
"""


@dataclass(frozen=True)
class Heading:
    """Of a section."""

    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph, or lines as they are."""

    text: str
    verbatim: bool = False


@dataclass(frozen=True)
class Table:
    """Rows under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A picture, its file and what it shows."""

    file: str
    caption: str
    png: bytes


Block = Heading | Text | Table | Picture


def write(study: Study, folder: Path, *, overwrite: bool) -> Path:
    """See `Study.report`; returns the HTML file."""
    if not results.complete(study.optuna):
        raise StudyError(
            "there is nothing to report",
            expected="at least one complete trial",
            got=results.progress(study),
            where=f"study {study.config.name!r} in {study.storage}",
            fix=_advice(study.optuna),
        )
    best = study.front()[:_MOST]
    blocks = _blocks(study, best)
    with whole_folder(folder, files=FILES, overwrite=overwrite or _is_of(study, folder)) as new:
        for block in blocks:
            if isinstance(block, Picture):
                (new / block.file).write_bytes(block.png)
        (new / HTML).write_text(as_html(study.config.name, blocks), encoding="utf-8")
        (new / MARKDOWN).write_text(as_markdown(study.config.name, blocks), encoding="utf-8")
        for index, trial in enumerate(best, 1):
            search = results.search_of(trial, study.config.search.folder)
            (new / f"best-{index}.yaml").write_text(search.to_yaml(folder.absolute()), encoding="utf-8")
        (new / STUDY).write_text(study.config.to_yaml(folder.absolute()), encoding="utf-8")
    return folder / HTML


def _is_of(study: Study, folder: Path) -> bool:
    """Whether what `folder` holds is a report of this study."""
    try:
        earlier = yaml.safe_load((folder / STUDY).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    mine = yaml.safe_load(study.config.to_yaml(folder.absolute()))
    return isinstance(earlier, dict) and not differing(earlier, mine)


def summary_html(study: Study) -> str:
    """What a notebook shows of a study."""
    head = f"<b>Study {html.escape(study.config.name)}</b>: {html.escape(results.progress(study))}"
    if not results.complete(study.optuna):
        return f"<p>{head}</p>"
    return f"<p>{head}</p>" + "".join(map(_html, _findings(study)))


def as_html(title: str, blocks: Sequence[Block]) -> str:
    """One file that needs no other."""
    body = "\n".join(map(_html, blocks))
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    page = f"<html lang=en><head>{head}</head><body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body></html>"
    return f"<!doctype html>\n{page}\n"


def as_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The same beside its pictures."""
    return "\n\n".join([f"# {title}", *map(_markdown, blocks)]) + "\n"


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{html.escape(block.text)}</h2>"
    if isinstance(block, Text):
        tag = "pre" if block.verbatim else "p"
        return f"<{tag}>{html.escape(block.text)}</{tag}>"
    if isinstance(block, Picture):
        data = base64.b64encode(block.png).decode()
        return f'<p><img alt="{html.escape(block.caption)}" src="data:image/png;base64,{data}"></p>'
    rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in block.rows]
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
    return f"<table><tr>{header}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"## {block.text}"
    if isinstance(block, Text):
        return f"```\n{block.text}\n```" if block.verbatim else block.text
    if isinstance(block, Picture):
        return f"![{block.caption}]({block.file})"
    lines = [block.header, ["---"] * len(block.header), *block.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _blocks(study: Study, best: Sequence[FrozenTrial]) -> list[Block]:
    config = study.config
    blocks: list[Block] = [Text(config.description)] if config.description else []
    blocks += [Text(f"Trials: {results.progress(study)}. Every score is taken after pruning."), *_findings(study)]
    blocks += [Heading("Best configurations"), Text(_what_is_best(study))]
    for index, trial in enumerate(best, 1):
        search = results.search_of(trial, config.search.folder)
        values = ", ".join(f"{name} {results.shown(value)}" for name, value in trial.params.items())
        score = f"{100 * results.mean(trial.user_attrs['scores']):.1f} %, {trial.user_attrs['params']:,} parameters"
        blocks.append(Text(f"best-{index}.yaml, trial {trial.number}: {score}; {values}"))
        blocks.append(Text(search.to_yaml(search.folder).rstrip(), verbatim=True))
    blocks += [*_failures(study), Heading("Environment"), _environment(study)]
    return [*blocks, Heading("The study"), Text(config.to_yaml(config.search.folder).rstrip(), verbatim=True)]


def _findings(study: Study) -> list[Block]:
    config, blocks = study.config, list[Block]()
    curves = study.curves()
    if curves:
        blocks += [
            Heading("Sensitivity"),
            Picture(
                "sensitivity.png",
                "Accuracy by factor; bands: 95 % t intervals over seeds",
                _png(plots.sensitivity(config, curves)),
            ),
            *_curve_tables(study, curves),
        ]
    found = study.importances()
    if found:
        blocks += [
            Heading("Importance"),
            Text("PED-ANOVA: the share of each factor in reaching the best quarter of the trials, by target."),
            Picture("importance.png", "Importance of each factor, by target", _png(plots.importance(found))),
            Table(
                ["factor", *found],
                [
                    [path, *(f"{found[t].get(path, math.nan):.2f}" for t in found)]
                    for path in next(iter(found.values()))
                ],
            ),
        ]
    elif curves:
        rows = [[c.factor, c.side, f"{100 * c.drop:.1f}"] for c in curves if c.task == MEAN]
        blocks += [
            Heading("Importance"),
            Text("One factor at a time: the best less the worst mean score along its curve, in points."),
            Table(["factor", "side", "points"], sorted(rows, key=lambda row: -float(row[2]))),
        ]
    trials = results.complete(study.optuna)
    if len(config.objectives) > 1 and config.mode == "optimise":
        front = study.front()
        values = [
            [str(t.number), *(f"{v:.4g}" for v in t.values), *(results.shown(t.params[p]) for p in config.factors)]
            for t in front
        ]
        picture = _png(plots.pareto(config, trials, front))
        blocks += [
            Heading("Pareto front"),
            Picture("pareto.png", "Trials by objective, the front marked", picture),
            Table(["trial", *config.objectives, *config.factors], values),
        ]
    rows_of_all = [(trial.params, results.mean(trial.user_attrs["scores"])) for trial in trials]
    picture = _png(plots.parallel(config, rows_of_all))
    return [*blocks, Heading("All trials"), Picture("parallel.png", "Parallel coordinates, by score", picture)]


def _curve_tables(study: Study, curves: Sequence[Curve]) -> list[Block]:
    """One table for each factor: values down, sides and tasks across."""
    blocks: list[Block] = []
    for path in study.config.factors:
        own = [curve for curve in curves if curve.factor == path]
        values = list(dict.fromkeys(point.value for curve in own for point in curve.points))
        at: dict[tuple[int, object], Point] = {(i, p.value): p for i, c in enumerate(own) for p in c.points}
        rows = []
        for value in values:
            row = [results.shown(value)]
            for index, curve in enumerate(own):
                point = at.get((index, value))
                row.append("" if point is None else results.score_text(point))
                if curve.task == MEAN:
                    row.append("" if point is None else f"{point.params:,.0f}")
            rows.append(row)
        header = [path]
        for curve in own:
            header += [f"{curve.side}: {curve.task}", *([f"{curve.side}: parameters"] if curve.task == MEAN else [])]
        if own:
            blocks.append(Table(header, rows))
    seeds = ", ".join(map(str, study.config.seeds))
    return [*blocks, Text(f"Accuracy in per cent, mean and 95 % t interval over the seeds {seeds}.")]


def _what_is_best(study: Study) -> str:
    if study.config.mode == "sensitivity":
        return (
            "By side, the setting with the best mean test score over seeds, as its first seed ran it; chosen on test "
            "data, and so a little optimistic. Run one with: gatedadapters search best-1.yaml"
        )
    return "Chosen on validation data. Run one, and score it on test data, with: gatedadapters search best-1.yaml"


def _failures(study: Study) -> list[Block]:
    failed = [t for t in queue.trials_of(study.optuna, TrialState.FAIL) if queue.SPARED not in t.user_attrs]
    if not failed:
        return []
    rows = [
        [str(t.number), t.user_attrs.get(queue.KEY, ""), _last_line(t.user_attrs.get(queue.ERROR, ""))] for t in failed
    ]
    return [Heading("Failed trials"), Table(["trial", "what", "error"], rows)]


def _environment(study: Study) -> Block:
    seconds = sum(trial.user_attrs["seconds"] for trial in results.complete(study.optuna))
    rows = [
        *([name, version] for name, version in versions().items()),
        ["optuna", optuna.__version__],
        ["python", platform.python_version()],
        ["machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"],
        ["seeds", ", ".join(map(str, study.config.seeds))],
        ["training time, all trials", f"{seconds:,.0f} s"],
    ]
    return Table(["", ""], rows)


def _advice(study: optuna.Study) -> str:
    failed = queue.trials_of(study, TrialState.FAIL)
    if failed:
        return f"mend what trial {failed[-1].number} died of: {_last_line(failed[-1].user_attrs.get(queue.ERROR, ''))}"
    return "run the study first"


def _last_line(error: str) -> str:
    lines = [line for line in error.strip().splitlines() if line.strip()]
    named = [line for line in lines if not line.startswith(" ")]
    return (named or lines or ["unknown"])[-1][:300]


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, facecolor="white")
    return file.getvalue()
