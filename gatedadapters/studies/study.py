"""A study in Python: load it, run it, look at its results, write its report."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, cast

import optuna
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from gatedadapters.config import CorruptionConfig, Factor, SearchConfig, StudyConfig
from gatedadapters.config.plugins import load_plugins
from gatedadapters.config.study import Value, differing, value_of
from gatedadapters.errors import StudyError
from gatedadapters.experiments.progress import say
from gatedadapters.reporting.versions import versions
from gatedadapters.robustness import Perturbation, corruption
from gatedadapters.studies import queue, results
from gatedadapters.studies.cells import Training, parameters, trainings
from gatedadapters.studies.measured import Measure, ReportProgress, metric_of, report_steps
from gatedadapters.studies.storage import check_workers, open_storage, told_of_storage
from gatedadapters.studies.workers import quiet_end, work, work_together

CONFIG = "gatedadapters"  # user attribute of the Optuna study, which holds the configuration


class Study:
    """Runs a search many times, to see how its scores depend on the sparsity weight, noise, perturbed data or any other
    field.

    Every trial is written to a storage. After an interruption, running the study again continues it.

    Args:
        config: which fields are varied, and how.
        storage: the file name of a journal, a URL that Optuna accepts, `grpc://HOST:PORT`, or one of Optuna's storage
            objects. Default: `NAME.journal` in the current folder.
        measure: scores a trial, in place of `objective.measure`. With several workers it must be importable.
        create: make the study if the storage has none of this name.

    Attributes:
        config: the configuration.
        storage: the given storage, or the default.
        optuna: the Optuna study underneath.

    Raises:
        StudyError: the storage cannot be used, holds a study of this name over another space, or holds none and
            `create` is False.
        ConfigError: an unknown noise or perturbation.
    """

    def __init__(
        self,
        config: StudyConfig,
        *,
        storage: str | Path | BaseStorage | None = None,
        measure: Measure | None = None,
        create: bool = True,
    ) -> None:
        self.config, self._measure = config, measure
        self.storage = storage if storage is not None else f"{config.name}.journal"
        _check_kinds(config)
        self.optuna = self._open(create)

    @classmethod
    def load(
        cls,
        preset_or_file: str | Path,
        *,
        search: SearchConfig | str | Path | None = None,
        storage: str | Path | BaseStorage | None = None,
        name: str | None = None,
        create: bool = True,
    ) -> Self:
        """Load a study from a preset or a YAML file.

        Args:
            preset_or_file: `"sensitivity"`, `"optimise"`, or a path that ends in .yaml.
            search: a search or its YAML file, which replaces the one in the study. Where it has no noise or
                perturbation, those of the study's own search are kept.
            storage: see the class.
            name: replaces the name in the file.
            create: see the class.

        Raises:
            ConfigError: an unknown preset, an unreadable file, an unknown factor or an invalid value.
            StudyError: see the class.
        """
        if isinstance(search, (str, Path)):
            search = SearchConfig.load(search)
        return cls(StudyConfig.load(preset_or_file, search=search, name=name), storage=storage, create=create)

    # -- running -------------------------------------------------------------------------------------------------------

    @told_of_storage
    def run(self, n_trials: int | None = None, *, workers: int = 1) -> Self:
        """Run the trials that are missing, and wait until they are done.

        Args:
            n_trials: run at most this many more; default: all.
            workers: number of processes on this machine. To use more machines, make the same call on each of them,
                with the same storage.

        Raises:
            StudyError: several workers with SQLite or with a storage in memory, or workers that die again and again.
            Nothing that the storage raises is chained to it: it may show a password.
        GatedAdaptersError: a table, a model or the storage cannot be used, before anything is computed.
        """
        check_workers(self.storage, workers)
        # Whoever runs a study again has stopped it, or lost power: that a process is gone is not the trial's fault.
        queue.Watch().collect(self.optuna, self.config.retries, uncounted=True)
        missing = queue.missing(self.optuna, self._jobs(), self.config.retries)[:n_trials]
        if missing or queue.trials_of(self.optuna, TrialState.WAITING):
            self._check_inputs()
            if (reason := self.unpruned) is not None:
                say(f"Study {self.config.name}: no trial will be stopped early, because {reason}")
        for job in missing:
            queue.enqueue(self.optuna, job)
        if workers == 1:
            self._work()
        else:
            work_together(_worker, (self.config, self.storage, self._measure), self.optuna, self.config, workers)
        return self

    def _check_inputs(self) -> None:
        """Read what every trial will read, so that a table that cannot be read does not fail in each of them.

        Raises:
            GatedAdaptersError: one cannot be read.
        """
        if self._measure is None:
            from gatedadapters.studies.objective import check_inputs  # training takes seconds to import

            check_inputs(self._searches())

    def _searches(self) -> Iterator[SearchConfig]:
        """Searches with every value of a factor that a trial may have, or the ends of its range."""
        for side in self.config.sides:
            yield self.config.search_of(side, {})
            for path, factor in self.config.factors.items():
                if side in self.config.sides_of(path):
                    yield from (self.config.search_of(side, {path: value}) for value in factor.ends())

    @property
    def unpruned(self) -> str | None:
        """The reason why no trial can be stopped early, although `prune` asks for it; None if trials can."""
        config = self.config
        if config.mode != "optimise" or not config.prune:
            return None
        if len(config.objectives) > 1:
            return "Optuna prunes studies of one objective only"
        if config.objectives != ("score",):
            return "only the score is reported during a run"
        if not any(report_steps(search) for search in self._searches()):
            prune = config.search.schedule.prune
            if prune is None:
                return "the schedule has no prune, after which scores are reported"
            steps = config.search.training.steps
            return f"runs of {steps} steps with the prune at {prune:g} have no step at which a score is reported"
        if config.trials <= (first := _trials_before_pruning(config)):
            return f"the first {first} trials are what others are compared with, and there are {config.trials} in all"
        return None

    @property
    def measure(self) -> Measure:
        """Scores a trial."""
        if self._measure is None:
            from gatedadapters.studies.objective import measure  # training takes seconds to import

            self._measure = measure
        return self._measure

    @cached_property
    def _trainings(self) -> dict[str, Training]:
        return {training.key: training for training in trainings(self.config)}

    def _jobs(self) -> list[queue.Job]:
        if self.config.mode == "optimise":
            return [queue.Job(f"trial-{index}", {}) for index in range(self.config.trials)]
        return [queue.Job(key, parameters(self.config, t.cell)) for key, t in self._trainings.items()]

    @told_of_storage
    def _work(self) -> None:
        """Run trials in this process until none is left."""
        work(self.optuna, self._run_trial, self.config)

    def _run_trial(self, study: optuna.Study, trial: Trial) -> list[float]:
        return self._optimise(trial) if self.config.mode == "optimise" else self._score(study, trial)

    def _score(self, study: optuna.Study, trial: Trial) -> list[float]:
        """A trial of a sensitivity study: one training, tested under all its perturbations."""
        training = self._trainings[trial.user_attrs[queue.KEY]]
        for name, value in parameters(self.config, training.cell).items():
            _suggest(trial, name, value, self.config)
        measured = self.measure(training.cell.search, training.cell.side, training.perturbations)
        results.store_result(trial, training.cell.search, training.cell.side, training.perturbations, measured)
        return [results.mean_score(measured.scores)]

    def _optimise(self, trial: Trial) -> list[float]:
        """A trial of an optimisation: one training for each seed, with values that the sampler chooses."""
        config = self.config
        (side,) = config.sides
        assignment = {path: _choose(trial, path, factor) for path, factor in config.factors.items()}
        search = config.search_of(side, assignment).model_copy(update={"perturbation": None})
        perturbations = (config.perturbed,) if config.perturbed is not None else ()
        found = []
        for index, seed in enumerate(config.seeds):
            seeded = search.model_copy(update={"training": search.training.model_copy(update={"seed": seed})})
            report = self._reporter(trial, index * search.training.steps)
            found.append(self.measure(seeded, side, perturbations, split="validation", report=report))
        measured = results.average_over_seeds(found)
        results.store_result(trial, search, side, perturbations, measured)
        metric = metric_of(config.search)
        values = results.objectives(measured, metric)
        for name, limit in config.constraints.items():
            sign = metric.sign if name == "score" else -1
            trial.set_constraint(name, sign * (limit - values[name]))
        return [values[name] for name in config.objectives]

    def _reporter(self, trial: Trial, offset: int) -> ReportProgress | None:
        """Reports intermediate scores to Optuna's pruner; None if the study does not prune."""
        if not self.config.prune or self.config.objectives != ("score",):
            return None

        def report(step: int, value: float) -> None:
            trial.report(value, offset + step)
            if trial.should_prune():
                raise optuna.TrialPruned

        return report

    # -- results -------------------------------------------------------------------------------------------------------

    @property
    @told_of_storage
    def trials(self) -> list[FrozenTrial]:
        """Every trial. A failed one has its `error` in the user attributes."""
        return queue.trials_of(self.optuna)

    @told_of_storage
    def curves(self) -> list[results.Curve]:
        """For each factor and side, the scores over its values, by task and as the mean over tasks, with 95 % intervals
        over seeds.
        """
        return results.curves(self.config, self.optuna)

    @told_of_storage
    def importances(self) -> dict[str, dict[str, float]]:
        """The share of each factor in the best trials, by target (`score`, `params`, `gap`): `results.importances`."""
        return results.importances(self.config, self.optuna)

    @told_of_storage
    def front(self) -> list[FrozenTrial]:
        """The Pareto front: feasible trials that no other trial beats. With one objective, the best trial."""
        return results.front(self.config, self.optuna)

    @told_of_storage
    def best(self) -> list[SearchConfig]:
        """The searches of the front, ready to run."""
        return [results.search_of(trial, self.config.search.folder) for trial in self.front()]

    @told_of_storage
    def report(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write `report.html` (self-contained), `report.md` with its pictures, the study and its best searches.

        Args:
            folder: where to write the report. An earlier report of this study is replaced.
            overwrite: replace the report of another study, too.

        Returns:
            The HTML file.

        Raises:
            StudyError: no trial is complete.
            ArtifactError: the folder holds something else.
        """
        from gatedadapters.studies.report import save_report  # matplotlib takes a second to import

        where = f"study {self.config.name!r} in {self.storage}"
        return save_report(
            self.config, self.optuna, Path(folder), overwrite=overwrite, where=where, unpruned=self.unpruned
        )

    def check_report(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Check that `report` may write into `folder`, before trials are run; see there for arguments.

        Raises:
            ArtifactError: the folder holds something else.
            FileAccessError: it cannot be written.
        """
        from gatedadapters.studies.report import check_folder  # matplotlib takes a second to import

        check_folder(self.config, Path(folder), overwrite=overwrite)

    @told_of_storage
    def tensorboard(self, folder: str | Path) -> None:
        """Write every complete trial as a TensorBoard run of its own, for the page that compares runs.

        TensorBoard takes its columns from the first run. So each run has the fields of all searches and all metrics.

        Args:
            folder: where to write the runs `trial-0`, `trial-1`, ... Runs that exist already are kept.
        """
        from gatedadapters.inspection import TensorBoardWriter  # TensorBoard takes a moment to import
        from gatedadapters.inspection.tensorboard import flat

        done = results.complete_trials(self.optuna)
        made_with = [
            flat({"side": trial.user_attrs["side"], **results.search_of(trial).as_written()}) for trial in done
        ]
        columns = dict.fromkeys((name for values in made_with for name in values), "none")
        for trial, values in zip(done, made_with, strict=True):
            run = Path(folder) / f"trial-{trial.number}"
            if not run.exists():
                with TensorBoardWriter(run) as writer:
                    writer.hparams({**columns, **values}, results.metrics(trial))

    @told_of_storage
    def __repr__(self) -> str:
        return f"Study({self.config.name!r}: {results.progress(self.optuna)})"

    @told_of_storage
    def __str__(self) -> str:
        note = "" if self.unpruned is None else f"\nNo trial was stopped early: {self.unpruned}."
        return f"{self!r}\n{results.study_table(self.config, self.optuna)}{note}"

    @told_of_storage
    def _repr_html_(self) -> str:
        from gatedadapters.studies.report import summary_html  # matplotlib takes a second to import

        return summary_html(self.config, self.optuna)

    # -- storage -------------------------------------------------------------------------------------------------------

    @told_of_storage
    def _open(self, create: bool) -> optuna.Study:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        config, where = self.config, self.storage
        storage = where if isinstance(where, BaseStorage) else open_storage(where, create=create)
        if config.name not in optuna.get_all_study_names(storage):
            if not create:
                raise StudyError(
                    "there is no such study",
                    expected=f"a study {config.name!r}",
                    got="none of that name",
                    where=f"storage {where}",
                    fix="name the storage it was run with, or run it first",
                )
            self._create(storage)
        study = optuna.load_study(storage=storage, study_name=config.name)
        self._check_same(study)
        study.sampler, study.pruner = _sampler(config, worker=0), _pruner(config)
        return study

    def _create(self, storage: BaseStorage) -> None:
        objectives = self.config.objectives if self.config.mode == "optimise" else ("score",)
        best: Literal["maximize", "minimize"] = (
            "maximize" if metric_of(self.config.search).higher_is_better else "minimize"
        )
        directions = [best if name == "score" else "minimize" for name in objectives]
        try:
            study = optuna.create_study(storage=storage, study_name=self.config.name, directions=directions)
        except DuplicatedStudyError:  # another machine was faster
            return
        self._describe(study)

    def _describe(self, study: optuna.Study) -> None:
        """Store what the study is, beside its trials."""
        study.set_user_attr(CONFIG, {"config": self.config.as_written(), "versions": versions()})

    def _check_same(self, study: optuna.Study) -> None:
        stored = _stored_config(study)
        if stored is None and not study.get_trials(deepcopy=False):  # whoever made it was killed before it wrote it
            self._describe(study)
            stored = _stored_config(study)
        if stored is None:
            raise StudyError(
                "a study of this name is there already, and is not one of ours",
                expected="a new name",
                got=repr(self.config.name),
                where=f"storage {self.storage}",
                fix="choose another name or storage",
            )
        ours = self.config.as_written()
        differ = differing(stored, ours)
        if differ:
            raise StudyError(
                "a study of this name over another space is there already",
                expected=f"the same {', '.join(differ)} as stored: {_short(stored, differ)}",
                got=_short(ours, differ),
                where=f"study {self.config.name!r} in {self.storage}",
                fix="give the study another name (--name) or --storage; what is stored stays as it is",
            )


def _worker(config: StudyConfig, storage: str | Path, measure: Measure | None, index: int) -> None:
    """The work of one of several processes."""
    with quiet_end():
        load_plugins()
        study = Study(config, storage=storage, measure=measure)
        study.optuna.sampler = _sampler(config, index)
        study._work()


def _stored_config(study: optuna.Study) -> dict[str, Any] | None:
    """The stored configuration of a study; None for a foreign study.

    The process that creates a study writes the configuration a moment later, so wait for it while there is no trial.
    """
    for _ in range(50):
        found: dict[str, Any] | None = study.user_attrs.get(CONFIG)
        if found is not None:
            config: dict[str, Any] = found["config"]
            return config
        if study.get_trials(deepcopy=False):
            return None
        time.sleep(0.1)
    return None


def _short(config: dict[str, Any], names: Sequence[str]) -> str:
    text = json.dumps({name: config.get(name) for name in names})
    return text if len(text) <= 300 else text[:300] + "..."


def _check_kinds(config: StudyConfig) -> None:
    """Check the names of noises and perturbations now, so that a wrong name does not fail in every trial.

    Raises:
        ConfigError: an unknown name, or a noise for training given as a perturbation of test data.
    """
    kinds = {path: factor.values or () for path, factor in config.factors.items() if path.endswith(".kind")}
    for head, only in (("noise", None), ("perturbation", Perturbation)):
        given: CorruptionConfig | None = getattr(config.search, head)
        named = [*([] if given is None else [given.kind]), *kinds.get(f"{head}.kind", ())]
        for kind in named:
            asked = CorruptionConfig(kind=str(kind), ratio=0)
            where = f"{head}: kind"
            corruption(asked, where=where) if only is None else corruption(asked, only=only, where=where)


def _sampler(config: StudyConfig, worker: int) -> optuna.samplers.BaseSampler:
    seed = 1000 * worker  # with one seed, all workers would choose the same values
    if config.mode == "sensitivity":
        return optuna.samplers.RandomSampler(seed=seed)
    if len(config.objectives) > 1:
        return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, config.trials // 4)))
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(3, min(10, config.trials // 4)))


def _pruner(config: StudyConfig) -> optuna.pruners.BasePruner:
    if config.mode == "sensitivity" or not config.prune or len(config.objectives) > 1:
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(n_startup_trials=_trials_before_pruning(config))


def _trials_before_pruning(config: StudyConfig) -> int:
    return max(3, min(8, config.trials // 4))


def _choose(trial: Trial, path: str, factor: Factor) -> Value:
    """Let the sampler choose a value."""
    if factor.values is not None:
        return cast(Value, trial.suggest_categorical(path, factor.values))
    assert factor.low is not None
    assert factor.high is not None
    if factor.integer:
        return trial.suggest_int(path, int(factor.low), int(factor.high), log=factor.log)
    return trial.suggest_float(path, factor.low, factor.high, log=factor.log)


def _suggest(trial: Trial, name: str, value: Value, config: StudyConfig) -> None:
    """Tell Optuna a value that is already fixed."""
    if name == "side":
        trial.suggest_categorical(name, tuple(config.sides))
        return
    if name == "seed":
        trial.suggest_int(name, 0, 2**31)
        return
    factor = config.factors[name]
    starts = (value_of(config.search_of(side, {}), name) for side in config.sides)
    grid = (*factor.grid(), *(start for start in starts if start is not None))
    if all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in grid):
        numbers = [float(v) for v in grid]
        trial.suggest_float(name, min(numbers), max(numbers), log=factor.log and min(numbers) > 0)
    else:
        trial.suggest_categorical(name, tuple(dict.fromkeys(grid)))
