"""What a stream came to, as data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import Field, ValidationError
from torch import nn

from gatedadapters.artifacts import Shelf
from gatedadapters.config.base import Config
from gatedadapters.continual.core import CORE, Core, load_core
from gatedadapters.continual.metrics import Metrics
from gatedadapters.continual.states import Change, digest, lead, read_record
from gatedadapters.errors import ArtifactError
from gatedadapters.reporting.tables import format_table
from gatedadapters.structure import Structure
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import attach, detach
from gatedadapters.supernet.supernet import NAME as ADAPTERS

STREAM, BASELINE, STAGE, CHANGE, MEMORY = "stream.json", "baseline.json", "stage.json", "change", "memory"
ATTACHED, ADAPTER = "attached.json", "adapter"


class StreamRecord(Config):
    """What a stream is: everything its result depends on, and the untrained scores."""

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
    """What one stage came to.

    Attributes:
        scores: on every task, in the order of the stream: a row of R.
        elements: how many were trained, heads not counted.
        tensors: how many were trained, or changed by paths that were merged; None where no part of the backbone was.
        seconds: of training.
        probe_seconds: of finding out what to train.
        bytes: to store this task: what it changed (heads included), or its adapter.
        state: digest of the model afterwards.
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
    """Scores of the untrained model."""

    scores: list[float]
    general: float | None


class AttachedAdapters(Config):
    """Adapters that a strategy leaves on the model, as they were attached.

    Attributes:
        structure: as JSON.
        heads: see `attach`.
        seed: of their first weights.
    """

    structure: str
    heads: list[str]
    seed: int

    def write(self, folder: Path) -> None:
        """Into what a strategy remembers of a stage."""
        (folder / ATTACHED).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def attach(self, model: nn.Module) -> None:
        """Attach them anew."""
        attach(model, Structure.from_json(self.structure), heads=self.heads, seed=self.seed).follows_ids = False


class StreamResult:
    """A finished stream.

    Attributes:
        record: what the stream was.
        baseline: scores of the untrained model.
        stages: one after the other.
        folder: where its states are, None where they were not kept.
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
    def load(cls, folder: str | Path, *, stages: int | None = None) -> Self:
        """From the folder of a stream.

        Args:
            folder: of `run_stream`.
            stages: how many of them, of a stream that may not be finished; default: all there are to be.

        Raises:
            ArtifactError: there is none, or not so much of it is finished.
        """
        path = Path(folder)
        try:
            record = StreamRecord.model_validate_json((path / STREAM).read_bytes())
            baseline = BaselineRecord.model_validate_json((path / BASELINE).read_bytes())
            found = [
                StageRecord.model_validate_json((stage_folder(path, i) / STAGE).read_bytes())
                for i in range(record.stages if stages is None else stages)
            ]
        except (OSError, ValidationError) as error:
            raise ArtifactError(
                "this is no finished stream",
                expected=f"{STREAM} and every stage",
                got=str(error).splitlines()[0],
                where=path,
                fix="run it again: it goes on where it stopped",
            ) from error
        return cls(record, baseline, found, path)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_data`, but for reports and the folder."""
        stages = [StageRecord.model_validate(stage) for stage in data["stages"]]
        record, baseline = (
            StreamRecord.model_validate(data["record"]),
            BaselineRecord.model_validate(data["baseline"]),
        )
        return cls(record, baseline, stages, None)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, in order."""
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
        """General scores, the untrained model's first; empty where none was measured."""
        found = [self.baseline.general, *(stage.general for stage in self.stages)]
        return [score for score in found if score is not None]

    @property
    def metrics(self) -> Metrics:
        """OP, BWT, FWT, forgetting, general delta."""
        return Metrics.of(self.matrix, self.baseline.scores, self.general)

    @property
    def elements(self) -> float:
        """Values trained per stage, on average; heads not counted."""
        return sum(stage.elements for stage in self.stages) / len(self.stages)

    def restore(self, model: nn.Module, to: int) -> None:
        """Lead a model from whichever state of the stream it is in to another, bit for bit; state 0 is the base, k
        follows k tasks. Which one it is in is told by a digest of its bits, and the end is checked by another.

        Under `lora` a plain base is given the stream's adapters first, which add nothing in state 0. Under `per_task`
        states differ in heads alone, and the tasks are served by `shelf`.

        Args:
            model: in any state of the stream, the base as it was before among them.
            to: which state.

        Raises:
            ArtifactError: the changes were not kept, the model is in no state of the stream, or a stored change was
                altered; the model is then left as it was.
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
        places = [stage_folder(self.folder, i) / CHANGE for i in range(last)]
        states = [read_record(places[0]).before, *(read_record(place).after for place in places)]
        attached = places[0].parent / MEMORY / ATTACHED
        added = attached.exists() and not hasattr(model, ADAPTERS)
        if added:
            AttachedAdapters.model_validate_json(attached.read_bytes()).attach(model)
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
            path = range(start, to) if to > start else range(start - 1, to - 1, -1)
            lead(model, [Change.load(places[i]) for i in path], states[to])
        except BaseException:
            if added:
                detach(model)
            raise

    @property
    def adapters(self) -> dict[str, Path]:
        """Under `per_task` the folder of each task's adapter; see `shelf`."""
        places = (
            {}
            if self.folder is None
            else {stage.task: stage_folder(self.folder, i) / MEMORY / ADAPTER for i, stage in enumerate(self.stages)}
        )
        return {task: place for task, place in places.items() if place.is_dir()}

    def shelf(self, model: nn.Module) -> Shelf:
        """Put the adapters of all tasks on the model that `per_task` left, each to be chosen by its task's name:

            with result.shelf(model).using("mood"):
                model(**batch)

        Raises:
            ArtifactError: the strategy left none, or the model is another.
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
            cast(Adapters, adapters).follows_ids = False  # each serves its task, whatever id that has
        return shelf

    def cores(self) -> list[tuple[str, Core]]:
        """What each task was allowed to move, or of merged paths did move; none where nothing was selected or kept."""
        if self.folder is None:
            return []
        places = [(stage.task, stage_folder(self.folder, i) / MEMORY) for i, stage in enumerate(self.stages)]
        return [(task, load_core(place)) for task, place in places if (place / CORE).exists()]

    def table(self) -> str:
        """R with the untrained scores, what each stage took, and the metrics."""
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
        m = self.metrics
        shown = {"OP": m.op, "BWT": m.bwt, "FWT": m.fwt, "forgetting": m.forgetting, "general delta": m.general_delta}
        line = ", ".join(f"{name} {value:.3f}" for name, value in shown.items() if value is not None)
        return f"{self.strategy}\n{format_table(header, rows)}\n{line}"

    def __str__(self) -> str:
        return self.table()

    def to_data(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "record": self.record.model_dump(mode="json"),
            "baseline": self.baseline.model_dump(mode="json"),
            "stages": [stage.model_dump(mode="json", exclude={"report"}) for stage in self.stages],
            "metrics": asdict(self.metrics),
        }

    def to_json(self) -> str:
        """As text."""
        return json.dumps(self.to_data(), indent=1) + "\n"


def stage_folder(folder: Path, index: int) -> Path:
    """Where a stage of a stream is."""
    return folder / "stages" / f"{index:03d}"
