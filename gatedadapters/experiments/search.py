"""Running a configuration from start to finish, and what it leaves in the output folder."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import transformers
from tqdm.auto import tqdm

from gatedadapters.cli.show import ADAPTER, sharing_table
from gatedadapters.config import SearchConfig
from gatedadapters.data import TextTask
from gatedadapters.errors import ArtifactError, BudgetError
from gatedadapters.experiments.arms import RIVALS, Arm, Experiment, majority
from gatedadapters.experiments.setup import load_tasks
from gatedadapters.inspection import save_png
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

LOGS, METRICS, PICTURE, CONFIG, TABLE = "tensorboard", "metrics.json", "structure.png", "search.yaml", "table.txt"
PEFT = "peft"
OUTPUTS = frozenset({ADAPTER, LOGS, METRICS, PICTURE, CONFIG, TABLE, PEFT})


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        arms: the searched structure first, then its rivals.
        baseline: test accuracy of always naming the most frequent class, by task.
        seconds: everything, loading and testing included.
        left_out: why a rival was not trained, by its name.
    """

    arms: tuple[Arm, ...]
    baseline: dict[str, float]
    seconds: float
    left_out: Mapping[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """Accuracy on test data by task, sizes and times; below it the rivals that did not fit."""
        tasks = list(self.baseline)
        perturbed = [arm.perturbed for arm in self.arms if arm.perturbed is not None]
        header = ["", *tasks, "mean", *(["perturbed"] if perturbed else []), "parameters", "paths", "train s"]
        rows = [
            [
                arm.name,
                *(f"{arm.accuracy[task]:.3f}" for task in tasks),
                f"{arm.mean:.3f}",
                *([] if arm.perturbed is None else [f"{sum(arm.perturbed.values()) / len(tasks):.3f}"]),
                f"{arm.structure.params:,}",
                str(len(arm.structure.paths)),
                f"{arm.seconds:.0f}",
            ]
            for arm in self.arms
        ]
        mean = sum(self.baseline.values()) / len(tasks)
        means = [f"{mean:.3f}"] * (2 if perturbed else 1)
        rows.append(["most frequent class", *(f"{self.baseline[t]:.3f}" for t in tasks), *means, "0", "0", "0"])
        notes = [f"{name} was not trained: {reason}" for name, reason in self.left_out.items()]
        return "\n".join([format_table(header, rows), *notes])

    def to_json(self, config: SearchConfig, tasks: list[TextTask]) -> str:
        """Every number, with what is needed to get it again."""
        data = {
            "versions": versions(),
            "config": config.as_written(),
            "examples": {t.name: {"train": len(t.train), "test": len(t.split("test"))} for t in tasks},
            "arms": [
                {
                    "name": arm.name,
                    "accuracy": arm.accuracy,
                    "perturbed": arm.perturbed,
                    "mean": arm.mean,
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
            "seconds": self.seconds,
        }
        return json.dumps(data, indent=1) + "\n"


def check_free(folder: Path, outputs: frozenset[str], *, overwrite: bool) -> None:
    """See that results can go into `folder`, before anything is computed.

    Logs alone are no results: a run that failed leaves them to be looked at, and the next one writes its own.

    Raises:
        ArtifactError: it holds results already, or files of others.
    """
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in held if name not in outputs]
    if folder.exists() and not folder.is_dir():
        held = foreign = ["a file"]
    results = [name for name in held if name != LOGS]
    if foreign or (results and not overwrite):
        raise ArtifactError(
            "the output folder is not empty",
            expected="a new or an empty folder",
            got=", ".join(foreign[:3] or results[:3]),
            where=folder,
            fix="give another with --out" + ("" if foreign else ", or --overwrite"),
        )


def run(config: SearchConfig, folder: Path, *, overwrite: bool = False) -> Outcome:
    """Search, compare, and write everything into `folder`, after each arm anew: no rival's failure costs the search.

    A rival that cannot be made as small as the searched structure is left out, and the results say so.

    Raises:
        GatedAdaptersError: whatever is wrong with the configuration, the data or the folder.
    """
    check_free(folder, OUTPUTS, overwrite=overwrite)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    start = time.perf_counter()
    tasks = load_tasks(config)
    experiment = Experiment(config, tasks, folder / LOGS)
    _say(f"{config.model}: {len(experiment.train):,} training examples of {len(tasks)} task(s)")
    shutil.rmtree(folder / LOGS, ignore_errors=True)
    total = config.training.steps * (1 + len(config.compare))
    baseline, arms, left_out = majority(tasks), list[Arm](), dict[str, str]()

    def written() -> Outcome:
        found = Outcome(tuple(arms), baseline, time.perf_counter() - start, left_out)
        (folder / CONFIG).write_text(config.to_yaml(folder.absolute()), encoding="utf-8")
        (folder / METRICS).write_text(found.to_json(config, tasks), encoding="utf-8")
        (folder / TABLE).write_text(found.table() + "\n", encoding="utf-8")
        return found

    with tqdm(total=total, unit="step", dynamic_ncols=True, file=sys.stderr) as progress:
        arms.append(experiment.search(progress, folder / ADAPTER, overwrite=overwrite))
        save_png(arms[0].structure, folder / PICTURE)
        outcome = written()
        for kind in config.compare:
            try:
                arms.append(experiment.rival(kind, arms[0].structure.params, progress))
            except BudgetError as error:
                left_out[RIVALS[kind]] = f"{error.message} (expected {error.expected})"
                progress.total = total = total - config.training.steps
            outcome = written()
        progress.set_description("done")
    return outcome


def report(config: SearchConfig, folder: Path, outcome: Outcome) -> None:
    """Print what a run came to and where it lies."""
    searched = outcome.arms[0].structure
    for task in config.tasks:
        if task.validation is not None and task.test is None:
            print(f"\n{task.title} has no test table: its validation table stands in as test data.")
    print(f"\nAccuracy on test data, {config.training.steps} steps each, one seed:\n")
    print(outcome.table())
    print(f"\n{searched}\n")
    if len(searched.tasks) > 1:
        print(sharing_table(searched), end="\n\n")
    print(f"{outcome.seconds:.0f} s in all. In {folder}:")
    for name, what in {
        f"{ADAPTER}/": 'the searched adapter; gatedadapters.load_adapters(model, "...")',
        PICTURE: "its structure as a picture",
        f"{LOGS}/": f"tensorboard --logdir {folder / LOGS}",
        METRICS: "every number",
        CONFIG: "the configuration; run it again with gatedadapters search",
    }.items():
        print(f"  {name:<15} {what}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)
