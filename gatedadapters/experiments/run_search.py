"""The run `search`: search a structure under a budget, train its rivals, and write everything into a folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatedadapters.config import SearchConfig
from gatedadapters.data import AnyTask, TextTask
from gatedadapters.errors import BudgetError
from gatedadapters.experiments import outputs
from gatedadapters.experiments.arms import Arm, ArmRunner
from gatedadapters.experiments.evaluation import Scores, majority_accuracy, mean_loss
from gatedadapters.experiments.progress import progress_bar, say, silence_transformers
from gatedadapters.experiments.rivals import RIVAL_NAMES
from gatedadapters.experiments.saved import sharing_table
from gatedadapters.experiments.task_models import load_tasks
from gatedadapters.inspection import save_png
from gatedadapters.reporting.tables import format_table
from gatedadapters.safe_files import file_errors


@dataclass(frozen=True)
class SearchResult:
    """The result of a search. Its text is what `gatedadapters search` prints.

    Attributes:
        config: the configuration of the run.
        folder: the output folder.
        arms: the searched structure first, then its rivals.
        baseline: test accuracy of always naming the most frequent class, by task; empty if there are no classes.
        seconds: duration of the whole run, loading and testing included.
        left_out: the reason why a rival was not trained, by the name of the rival.
        base: scores of the language model before any training, by task; None for a classifier, whose heads are new.
    """

    config: SearchConfig
    folder: Path
    arms: tuple[Arm, ...]
    baseline: dict[str, float]
    seconds: float
    left_out: Mapping[str, str] = field(default_factory=dict)
    base: Scores | None = None

    def table(self) -> str:
        """Scores on test data by task, sizes and times; below it the rivals that were left out.

        The scores are accuracies and the mean loss of classification tasks, losses and other measures of other tasks.
        """
        header, rows = self._losses() if self.base is not None else self._accuracies()
        notes = [f"{name} was not trained: {reason}" for name, reason in self.left_out.items()]
        return "\n".join([format_table([*header, "parameters", "paths", "train s"], rows), *notes])

    def _accuracies(self) -> tuple[list[str], list[list[str]]]:
        tasks = list(self.baseline)
        perturbed = [arm.perturbed for arm in self.arms if arm.perturbed is not None]
        header = ["", *tasks, "mean", *(["perturbed"] if perturbed else []), "loss"]
        rows = [
            [
                arm.name,
                *(f"{arm.accuracy[task]:.3f}" for task in tasks),
                f"{arm.mean:.3f}",
                *([] if arm.perturbed is None else [f"{sum(arm.perturbed.values()) / len(tasks):.3f}"]),
                f"{arm.loss:.3f}",
                *_size(arm),
            ]
            for arm in self.arms
        ]
        mean = sum(self.baseline.values()) / len(tasks)
        means = [f"{mean:.3f}"] * (2 if perturbed else 1)
        rows.append(["most frequent class", *(f"{self.baseline[t]:.3f}" for t in tasks), *means, "", "0", "0", "0"])
        return header, rows

    def _losses(self) -> tuple[list[str], list[list[str]]]:
        assert self.base is not None
        named = [(task, name) for task, score in self.base.items() for name in score.measures]
        several, perturbed = len(self.base) > 1, self.arms[0].perturbed_scores is not None
        header = ["", *(f"{task} loss" for task in self.base), *(["mean loss"] if several else [])]
        header += [f"{task} {name.replace('_', ' ')}" for task, name in named]
        header += ["perturbed loss"] if perturbed else []

        def row(name: str, scores: Scores, under: Scores | None, size: list[str]) -> list[str]:
            cells = [f"{score.loss:.4f}" for score in scores.values()]
            cells += [f"{mean_loss(scores):.4f}"] if several else []
            cells += [f"{scores[task].measures[measure]:.3f}" for task, measure in named]
            cells += [""] if perturbed and under is None else [] if under is None else [f"{mean_loss(under):.4f}"]
            return [name, *cells, *size]

        rows = [row(arm.name, arm.scores, arm.perturbed_scores, _size(arm)) for arm in self.arms]
        return header, [*rows, row("the base model", self.base, None, ["0", "0", "0"])]

    def to_data(self) -> dict[str, Any]:
        """Every number of the arms as plain data."""
        return {
            "arms": [
                {
                    "name": arm.name,
                    "scores": _plain(arm.scores),
                    "loss": arm.loss,
                    "perturbed_scores": None if arm.perturbed_scores is None else _plain(arm.perturbed_scores),
                    **(
                        {"accuracy": arm.accuracy, "perturbed": arm.perturbed, "mean": arm.mean} if arm.accuracy else {}
                    ),
                    "params": arm.structure.params,
                    "dense_params": arm.structure.dense_params,
                    "paths": len(arm.structure.paths),
                    "train_seconds": arm.seconds,
                    "sharing": arm.structure.sharing(),
                }
                for arm in self.arms
            ],
            "left_out": dict(self.left_out),
            "most_frequent_class": self.baseline,
            "base": None if self.base is None else _plain(self.base),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        searched = self.arms[0].structure
        what = "Accuracy" if self.base is None else "Loss per token"
        parts = [
            f"\n{task.title} has no test table: its validation table stands in as test data."
            for task in self.config.tasks
            if task.validation is not None and task.test is None
        ]
        parts += [
            f"\n{what} on test data, {self.config.training.steps} steps each, one seed:\n",
            self.table(),
            f"\n{searched}\n",
        ]
        if len(searched.tasks) > 1:
            parts.append(f"{sharing_table(searched)}\n")
        parts.append(f"{self.seconds:.0f} s in all. In {self.folder}:")
        contents = {
            f"{outputs.ADAPTER}/": f"the trained adapter; gatedadapters predict {self.folder} --text ...",
            outputs.STRUCTURE_PICTURE: "its structure as a picture",
            f"{outputs.LOGS}/": f"tensorboard --logdir {self.folder / outputs.LOGS}",
            outputs.METRICS: "every number",
            outputs.SEARCH_CONFIG: "the configuration; run it again with gatedadapters search",
        }
        return "\n".join([*parts, outputs.list_outputs(contents)])


@file_errors("read or write a file of the run", "search")
def search(
    config: SearchConfig | str | Path, out: str | Path | None = None, *, overwrite: bool = False
) -> SearchResult:
    """Search a structure and compare it with its rivals, as `gatedadapters search` does.

    The files of results are written again after each arm, so the search is not lost if a rival fails. A rival that
    cannot be made as small as the searched structure is left out, and the result says so.

    Args:
        config: the configuration, or the path of its YAML file.
        out: folder of the results. Default: the name of the YAML file, in the current folder.
        overwrite: whether to replace the results of an earlier run in that folder.

    Raises:
        GatedAdaptersError: the configuration, the model, the data or the folder cannot be used, before anything is
            written; or training failed.
    """
    config, folder = outputs.config_and_folder(SearchConfig, config, out)
    outputs.check_output_folder(folder, outputs.OF_SEARCH, overwrite=overwrite)
    silence_transformers()
    start = time.perf_counter()
    tasks = load_tasks(config)
    runner = ArmRunner(config, tasks, folder / outputs.LOGS)
    say(f"{config.model}: {len(runner.train_data):,} training examples of {len(tasks)} task(s)")
    shutil.rmtree(folder / outputs.LOGS, ignore_errors=True)
    labelled = [task for task in tasks if isinstance(task, TextTask)]
    base = None if labelled else runner.scores()
    baseline, arms, left_out = majority_accuracy(labelled), list[Arm](), dict[str, str]()

    def written() -> SearchResult:
        result = SearchResult(config, folder, tuple(arms), baseline, time.perf_counter() - start, left_out, base)
        _write(result, tasks)
        return result

    steps = config.training.steps
    total = steps * (1 + len(config.compare))
    with progress_bar(total) as progress:
        arms.append(runner.run_search(progress, folder / outputs.ADAPTER, overwrite=overwrite))
        save_png(arms[0].structure, folder / outputs.STRUCTURE_PICTURE)
        result = written()
        for kind in config.compare:
            try:
                arms.append(runner.run_rival(kind, arms[0].structure.params, progress))
            except BudgetError as error:
                left_out[RIVAL_NAMES[kind]] = f"{error.message} (expected {error.expected})"
                progress.total = total = total - steps
            result = written()
        progress.set_description("done")
    return result


def _size(arm: Arm) -> list[str]:
    return [f"{arm.structure.params:,}", str(len(arm.structure.paths)), f"{arm.seconds:.0f}"]


def _plain(scores: Scores) -> dict[str, dict[str, float]]:
    """Loss and measures by task, as plain data."""
    return {task: {"loss": score.loss, **score.measures} for task, score in scores.items()}


def _write(result: SearchResult, tasks: Sequence[AnyTask]) -> None:
    config, folder = result.config, result.folder
    (folder / outputs.SEARCH_CONFIG).write_text(config.to_yaml(folder.absolute()), encoding="utf-8")
    examples = {t.name: {"train": len(t.train), "test": len(t.split("test"))} for t in tasks}
    outputs.write_metrics(folder, {"config": config.as_written(), "examples": examples, **result.to_data()})
    outputs.write_table(folder, result.table())
