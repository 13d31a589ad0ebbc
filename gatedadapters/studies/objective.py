"""One trial: train, prune, test."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from gatedadapters.config import CorruptionConfig, SearchConfig, TaskConfig, TrainingConfig
from gatedadapters.config.study import StudySide
from gatedadapters.data import AnyTask
from gatedadapters.experiments.arms import ArmRunner
from gatedadapters.experiments.evaluation import Scores, accuracies
from gatedadapters.experiments.models import load_config_and_tokenizer
from gatedadapters.experiments.progress import silence_transformers
from gatedadapters.experiments.sides import trained_side
from gatedadapters.experiments.task_models import load_tasks
from gatedadapters.studies.measured import ACCURACY, Measured, ReportProgress, metric_of, report_steps


def measure(
    search: SearchConfig,
    side: StudySide,
    perturbations: Sequence[CorruptionConfig] = (),
    *,
    split: str = "test",
    report: ReportProgress | None = None,
) -> Measured:
    """Train one side of a search, prune it, and test it on clean and on perturbed data.

    Args:
        search: the search, with the seed of this trial.
        side: see `trained_side`.
        perturbations: each is applied to the tested split.
        split: `test` or `validation`.
        report: called with the step and the mean validation score a few times after the prune. It may raise an
            exception to stop the trial.

    Raises:
        GatedAdaptersError: the search or its data are not valid.
    """
    silence_transformers()
    tasks = list(_tasks(search.model, search.tasks, search.training.seed))
    reporting = [] if report is None else [_ReportScore(report, search)]
    runner = ArmRunner(search, tasks, None, perturbations=perturbations, callbacks=reporting)
    for callback in reporting:
        callback.runner = runner
    with (
        tqdm(total=search.training.steps, file=io.StringIO()) as progress,
        trained_side(runner, side, progress) as trained,
    ):
        scores = _in_metric(runner.scores(split), search)
        perturbed = tuple(_in_metric(runner.scores(split, p), search) for p in runner.perturbations)
        return Measured(scores, perturbed, trained.params, trained.seconds)


def check_inputs(searches: Iterable[SearchConfig]) -> None:
    """Read what trials of these searches will read: each table, and the settings and tokenizer of each model.

    Raises:
        GatedAdaptersError: one cannot be read, or a model does not read texts of the length.
    """
    silence_transformers()
    seen = set()
    for search in searches:
        tasks = tuple(task.model_copy(update={"max_train": None, "max_test": None}) for task in search.tasks)
        key = search.model, tasks, search.training.max_length
        if key not in seen:
            seen.add(key)
            load_config_and_tokenizer(search.model, search.training.max_length)
            _tasks(search.model, search.tasks, search.training.seed)


def _in_metric(scores: Scores, search: SearchConfig) -> dict[str, float]:
    """Accuracies or losses by task."""
    if metric_of(search) is ACCURACY:
        return accuracies(scores)
    return {name: score.loss for name, score in scores.items()}


@lru_cache(maxsize=4)
def _tasks(model: str, tasks: tuple[TaskConfig, ...], seed: int) -> tuple[AnyTask, ...]:
    return tuple(load_tasks(SearchConfig(model=model, tasks=tasks, training=TrainingConfig(seed=seed))))


class _ReportScore(TrainerCallback):
    """Reports the mean validation score at `report_steps`."""

    runner: ArmRunner

    def __init__(self, report: ReportProgress, search: SearchConfig) -> None:
        self.report, self.search, self.steps = report, search, report_steps(search)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report if this is one of the steps."""
        if state.global_step in self.steps:
            scores = _in_metric(self.runner.scores("validation"), self.search).values()
            self.report(state.global_step, sum(scores) / len(scores))
