"""The result of a stream as data, the names of its files, and the restoring of its states."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import Field
from torch import Tensor, nn

from gatedadapters.artefact_files import read_all, with_digests
from gatedadapters.artifacts import Shelf
from gatedadapters.config.base import Config, Record, read_record
from gatedadapters.continual.core import Core, load_core
from gatedadapters.continual.metrics import METRIC_LABELS, Metrics
from gatedadapters.continual.states import Change, apply_changes, digest, read_change_record
from gatedadapters.errors import ArtifactError
from gatedadapters.reporting.tables import format_table
from gatedadapters.structure import Structure
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import attach, detach
from gatedadapters.supernet.supernet import NAME as ADAPTERS

STREAM, BASELINE = "stream.json", "baseline.json"  # in the folder of a stream: its record, the untrained scores
STAGE, CHANGE, MEMORY = "stage.json", "change", "memory"  # of a stage: its record, what changed, the strategy's files
ATTACHED, ADAPTER = "attached.json", "adapter"  # among the strategy's files


class StreamRecord(Config):
    """Everything that the result of a stream depends on.

    Attributes:
        version: of the format.
        tasks: what identifies each task, see `Task.identity`.
        general: the same for the general task; None where there is none.
        strategy: see `Strategy.identity`.
        training: the training configuration.
        seed: of the stream.
        keep: whether every state is stored, or the last one alone.
        base: digest of the untrained model.
        elements: of the backbone.
        stages: how many stages the stream has.
        versions: of the packages that it was begun with.
    """

    version: Literal[1] = 1
    tasks: list[dict[str, Any]]
    general: dict[str, Any] | None
    strategy: dict[str, Any]
    training: dict[str, Any]
    seed: int
    keep: bool
    base: str
    elements: int
    stages: int
    versions: dict[str, str] = Field(default_factory=dict)


class StageRecord(Config):
    """The result of one stage.

    Attributes:
        task: name of the task that was tuned, or `all tasks`.
        scores: of every task after the stage, in the order of the stream: a row of R.
        general: score of the general task; None where there is none.
        elements: how many values were trained, heads not counted.
        tensors: how many tensors of the backbone are in the core, or were changed by paths that were merged; None where
            there is neither.
        seconds: of training.
        probe_seconds: of finding out what to train.
        evaluation_seconds: of scoring all tasks and storing the stage.
        bytes: that store this task: what it changed (heads included), or its adapter.
        state: digest of the model after the stage.
        report: the structure and the core as text.
    """

    task: str
    scores: list[float]
    general: float | None
    elements: int
    tensors: int | None
    seconds: float
    probe_seconds: float
    evaluation_seconds: float
    bytes: int
    state: str
    report: str = ""


class BaselineRecord(Config):
    """Scores of the untrained model.

    Attributes:
        scores: of every task, in the order of the stream.
        general: score of the general task; None where there is none.
    """

    scores: list[float]
    general: float | None


class AttachedAdapters(Config):
    """How adapters were attached that a strategy leaves on the model, so that they can be attached again.

    Attributes:
        structure: their structure as JSON.
        heads: names of the parameters of all heads; see `attach`.
        seed: of their first weights.
    """

    structure: str
    heads: list[str]
    seed: int

    def write(self, folder: Path) -> None:
        """Write a file into the folder of what a strategy stores of a stage."""
        (folder / ATTACHED).write_text(with_digests(self.model_dump_json(indent=1)), encoding="utf-8")

    def attach(self, model: nn.Module) -> None:
        """Attach the adapters to a model, with their first weights."""
        attach(model, Structure.from_json(self.structure), heads=self.heads, seed=self.seed).follows_ids = False


class StreamResult:
    """The result of a stream: scores, metrics and costs; with a folder also its states and cores.

    Attributes:
        record: everything that the result depends on.
        baseline: scores of the untrained model.
        stages: the results of all stages, in order.
        folder: of the stream; None if it was run without one.
    """

    record: StreamRecord
    baseline: BaselineRecord
    stages: list[StageRecord]
    folder: Path | None

    def __init__(
        self, record: StreamRecord, baseline: BaselineRecord, stages: list[StageRecord], folder: Path | None
    ) -> None:
        self.record, self.baseline, self.stages, self.folder = record, baseline, stages, folder

    @classmethod
    def load(cls, folder: str | Path, *, stages: int | None = None, verify: bool = True) -> Self:
        """Read the result of a stream from its folder.

        Args:
            folder: the folder that was given to `run_stream`.
            stages: how many stages to read, of a stream that may not be finished; default: all.
            verify: check the digests of the records, which tell damage. Streams of releases 0.1 and 0.2 have none.

        Raises:
            ArtifactError: the folder holds no stream, not so many stages of it are finished, or a record is damaged.
        """
        path = Path(folder)
        record = read_stream_record(path, verify=verify)
        baseline = _read(BaselineRecord, path / BASELINE, verify)
        count = record.stages if stages is None else stages
        found = [_read(StageRecord, stage_folder(path, i) / STAGE, verify) for i in range(count)]
        _check_counts(record, baseline, found, path)
        return cls(record, baseline, found, path)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Build a result from what `to_data` returned. Reports and the folder are not part of it."""
        stages = [StageRecord.model_validate(stage) for stage in data["stages"]]
        record, baseline = (
            StreamRecord.model_validate(data["record"]),
            BaselineRecord.model_validate(data["baseline"]),
        )
        return cls(record, baseline, stages, None)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        return tuple(str(task["name"]) for task in self.record.tasks)

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return str(self.record.strategy["kind"])

    @property
    def matrix(self) -> list[list[float]]:
        """R: scores after each stage (rows) on each task (columns)."""
        return [stage.scores for stage in self.stages]

    @property
    def general(self) -> list[float]:
        """Scores of the general task, the untrained model's first; empty where there is none."""
        found = [self.baseline.general, *(stage.general for stage in self.stages)]
        return [score for score in found if score is not None]

    @property
    def metrics(self) -> Metrics:
        """OP, BWT, FWT, forgetting and general delta."""
        return Metrics.of(self.matrix, self.baseline.scores, self.general)

    @property
    def elements(self) -> float:
        """How many values were trained per stage, on average; heads are not counted."""
        return sum(stage.elements for stage in self.stages) / len(self.stages)

    def restore(self, model: nn.Module, to: int) -> None:
        """Take a model from the state of the stream that it is in to another one, bit for bit.

        State 0 is the untrained model, state k follows k tasks. A digest of its bits tells which state the model is in,
        and the digest of the new state is checked.

        Under `lora`, a model without adapters is first given those of the stream; in state 0 they add nothing. Under
        `per_task` the states differ in heads alone; see `shelf` for the adapters.

        Args:
            model: in any state of the stream, the untrained one included.
            to: number of the state.

        Raises:
            ArtifactError: the states were not stored, the model is in no state of the stream, or a stored change is
                damaged. The model is then left as it was.
        """
        last = len(self.stages)
        if self.folder is None or not self.record.keep or not 0 <= to <= last:
            raise ArtifactError(
                "there is no such state to restore",
                expected=f"states 0..{last} of a stream run with folder= and keep",
                got=f"state {to}",
                where=self.folder or "a stream without a folder",
                fix="run it with folder=",
            )
        folders = [stage_folder(self.folder, i) / CHANGE for i in range(last)]
        records = [read_change_record(folder) for folder in folders]
        states = [records[0].before, *(record.after for record in records)]
        attached = folders[0].parent / MEMORY / ATTACHED
        added = attached.exists() and not hasattr(model, ADAPTERS)
        if added:
            _read(AttachedAdapters, attached, verify=True).attach(model)
        try:
            found = digest(model)
            if found not in states:
                raise ArtifactError(
                    "the model is in no state of this stream",
                    expected=", ".join(state[:8] for state in states),
                    got=found[:8],
                    where="StreamResult.restore",
                    fix="give the base as it was before the stream, or the model that the stream left",
                )
            start = min((i for i, state in enumerate(states) if state == found), key=lambda i: abs(i - to))
            between = range(start, to) if to > start else range(start - 1, to - 1, -1)
            apply_changes(model, [Change.load(folders[i]) for i in between], states[to])
        except BaseException:
            if added:
                detach(model)
            raise

    @property
    def adapters(self) -> dict[str, Path]:
        """Under `per_task` the folder of each task's adapter, by the task's name; see `shelf`."""
        folders = (
            {}
            if self.folder is None
            else {stage.task: stage_folder(self.folder, i) / MEMORY / ADAPTER for i, stage in enumerate(self.stages)}
        )
        return {task: folder for task, folder in folders.items() if folder.is_dir()}

    def shelf(self, model: nn.Module) -> Shelf:
        """Attach the adapters of all tasks to the model that `per_task` left. Each is chosen by its task's name:

            with result.shelf(model).using("mood"):
                model(**batch)

        Raises:
            ArtifactError: the strategy left no adapters, or the model is another.
        """
        if not self.adapters:
            raise ArtifactError(
                "no task of this stream has adapters of its own",
                expected="a stream of per_task, run with folder=",
                got=self.strategy,
                where="StreamResult.shelf",
                fix="restore a state instead",
            )
        shelf = Shelf.load(model, self.adapters)
        for adapters in shelf.members.values():
            cast(Adapters, adapters).follows_ids = False  # each serves its own task, whatever the task ids of the heads
        return shelf

    def cores(self) -> list[tuple[str, Core]]:
        """Names of the tasks and their cores: what each task was allowed to move, or what merged paths changed.

        Empty where the strategy selects no cores, or the stream was run without a folder.

        Raises:
            ArtifactError: the files of a core are missing or damaged.
        """
        if self.folder is None:
            return []
        folders = [(stage, stage_folder(self.folder, i) / MEMORY) for i, stage in enumerate(self.stages)]
        return [(stage.task, load_core(folder)) for stage, folder in folders if stage.tensors is not None]

    def table(self) -> str:
        """R with the untrained scores, the costs of each stage, and the metrics."""
        header = [
            "after",
            *self.tasks,
            *(["general"] if self.general else []),
            "elements",
            "train s",
            "probe s",
            "bytes",
        ]
        extra = [] if self.baseline.general is None else [f"{self.baseline.general:.3f}"]
        rows = [["nothing", *(f"{s:.3f}" for s in self.baseline.scores), *extra, "0", "", "", ""]]
        for stage in self.stages:
            own = [] if stage.general is None else [f"{stage.general:.3f}"]
            rows.append(
                [
                    stage.task,
                    *(f"{s:.3f}" for s in stage.scores),
                    *own,
                    f"{stage.elements:,}",
                    f"{stage.seconds:.0f}",
                    f"{stage.probe_seconds:.0f}",
                    f"{stage.bytes:,}",
                ]
            )
        values = {METRIC_LABELS[name]: value for name, value in asdict(self.metrics).items()}
        line = ", ".join(f"{label} {value:.3f}" for label, value in values.items() if value is not None)
        return f"{self.strategy}\n{format_table(header, rows)}\n{line}"

    def __str__(self) -> str:
        return self.table()

    def to_data(self) -> dict[str, Any]:
        """The result as plain data, without reports."""
        return {
            "record": self.record.model_dump(mode="json"),
            "baseline": self.baseline.model_dump(mode="json"),
            "stages": [stage.model_dump(mode="json", exclude={"report"}) for stage in self.stages],
            "metrics": asdict(self.metrics),
        }

    def to_json(self) -> str:
        """The result as JSON."""
        return json.dumps(self.to_data(), indent=1) + "\n"


def read_stream_record(folder: Path, *, verify: bool = True) -> StreamRecord:
    """Read the record of a stream.

    Raises:
        ArtifactError: the file is missing, damaged or of another kind.
    """
    return _read(StreamRecord, folder / STREAM, verify, versions=(1,))


def read_memory(memory: Path, name: str) -> dict[str, Tensor]:
    """Tensors that a strategy stored of a finished stage, checked against their digest in the record of the stage.

    Args:
        memory: the folder of what the strategy stored.
        name: of the file.

    Raises:
        ArtifactError: the file or the record of the stage is missing, damaged or of another kind.
    """
    record = read_record(
        StageRecord,
        memory.parent / STAGE,
        what="a finished stage",
        expected=f"{STAGE} beside {MEMORY}",
        fix="run the stream again: it goes on where it stopped",
        versions=None,
    )
    return read_all(memory / name, digest=record[1].digest(f"{MEMORY}/{name}"))[0]


def _read(kind: type[Record], file: Path, verify: bool, versions: tuple[int, ...] | None = None) -> Record:
    return read_record(
        kind,
        file,
        what="a finished stream",
        expected=f"{STREAM} and every stage",
        fix="run the stream again: it goes on where it stopped",
        verify=verify,
        versions=versions,
    )[0]


def _check_counts(record: StreamRecord, baseline: BaselineRecord, stages: list[StageRecord], where: Path) -> None:
    """Check that there is a score for every task."""
    for scores in (baseline.scores, *(stage.scores for stage in stages)):
        if len(scores) != len(record.tasks):
            raise ArtifactError(
                "the records of a stream do not belong together",
                expected=f"{len(record.tasks)} scores, one for each task",
                got=len(scores),
                where=where,
                fix="restore the folder as it was written",
            )
    general = [baseline.general is not None, *(stage.general is not None for stage in stages)]
    if len(set(general)) > 1:
        raise ArtifactError(
            "the records of a stream do not belong together",
            expected="a score of the general task in all of them or in none",
            got=f"{sum(general)} of {len(general)} have one",
            where=where,
            fix="restore the folder as it was written",
        )


def stage_folder(folder: Path, index: int) -> Path:
    """The folder of one stage of a stream."""
    return folder / "stages" / f"{index:03d}"
