"""Runs a stream: tunes one model on task after task and evaluates it after each.

Everything a stream needs to go on lies in its folder, so that a stream which is killed at any moment and run again
ends with the same bits.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gatedadapters.artefact_files import file_digest, with_digests
from gatedadapters.backbone.fingerprint import fingerprint
from gatedadapters.config import StreamTrainingConfig
from gatedadapters.continual.check import check_stream
from gatedadapters.continual.core import Core, save_core
from gatedadapters.continual.digests import difference
from gatedadapters.continual.result import (
    ADAPTER,
    BASELINE,
    CHANGE,
    MEMORY,
    STAGE,
    STREAM,
    BaselineRecord,
    StageRecord,
    StreamRecord,
    StreamResult,
    read_stream_record,
    stage_folder,
)
from gatedadapters.continual.stage import Stage
from gatedadapters.continual.states import Change, Snapshot, digest, state_of
from gatedadapters.continual.strategies import Strategy, TunedStage, resolve
from gatedadapters.continual.tasks import Task, TaskStream
from gatedadapters.errors import ArtifactError
from gatedadapters.masking.delta import find_delta
from gatedadapters.reporting.versions import versions
from gatedadapters.safe_files import file_errors, leftovers, remove_leftovers, sole_user, whole_folder, write_text
from gatedadapters.supernet.attach import detach
from gatedadapters.supernet.supernet import NAME as ADAPTERS
from gatedadapters.training.devices import on_cpu

OnStage = Callable[[StreamResult], None]
STAGE_FILES = frozenset({STAGE, CHANGE, MEMORY})


def run_stream(
    model: nn.Module,
    tasks: TaskStream | Sequence[Task],
    strategy: str | Mapping[str, Any] | Strategy = "l2_fisher",
    *,
    training: StreamTrainingConfig | None = None,
    folder: str | Path | None = None,
    keep: bool = True,
    watch: Callable[[str], None] | None = None,
    on_stage: OnStage | None = None,
) -> StreamResult:
    """Tune `model` on task after task, in place, and evaluate it on all tasks after each.

    Afterwards the model is in its last state. With `folder`, everything needed to go on is stored as the stream
    proceeds. Called again with the same arguments and the untrained model, a stream that was killed ends with the same
    bits as one that was not; a stream that is finished is read, and its last state is put into the model.

    Heads of tasks (`Task.heads`) are trained with their task under every strategy. They count neither as core nor as
    trained elements. Every other element that a strategy does not select is bit-frozen. Whether a parameter required
    gradients before makes no difference: `sequential` also moves what was frozen. To keep tensors fixed, select with
    `core.exclude`. Afterwards parameters require gradients as before; but under adapters that a strategy leaves
    attached the backbone is frozen.

    Args:
        model: untrained, without adapters or a delta: a `MultiTaskClassifier`, a causal language model, or whatever the
            tasks can score.
        tasks: in the order they come.
        strategy: a name, its options with the name as `kind`, or a `Strategy`.
        training: how long and how fast each task is tuned.
        folder: where the stream is stored, so that it can go on and its states can be restored.
        keep: store what each task changed; False stores the last state alone.
        watch: called with a line about what comes next.
        on_stage: called with the stream so far after each stage, also after stages that a resumed stream finds
            finished; for example `TensorBoardWriter(...).stream`.

    Raises:
        TaskError, DataError, ConfigError, AttachError, MaskError: the arguments do not go together; see `check_stream`.
            Nothing was computed or written.
        ArtifactError: the folder holds files of others, or a stream of other tasks, another order or other settings;
            or another process runs the stream at the moment.
        TrainingError: a loss is not finite.

    Whatever is raised, the model is then bit for bit what it was, and a stream in a folder can go on.
    """
    chosen, training = resolve(strategy), training or StreamTrainingConfig()
    setup = check_stream(model, tasks, chosen, training=training)
    with tempfile.TemporaryDirectory(prefix="gatedadapters-") as scratch:
        path = Path(folder) if folder is not None else Path(scratch) / "stream"
        first = Stage(**vars(setup), index=0, folder=path, watch=watch or (lambda _: None))
        result = StreamRunner(first, chosen, keep=keep, on_stage=on_stage).run()
    if folder is None:
        result.folder = None
    return result


class StreamRunner:
    """Runs the stages of a checked stream one after the other.

    Args:
        first: the first stage.
        strategy: tunes each stage.
        keep: see `run_stream`.
        on_stage: see `run_stream`.
    """

    def __init__(self, first: Stage, strategy: Strategy, *, keep: bool, on_stage: OnStage | None = None) -> None:
        self.first, self.strategy, self.keep = first, strategy, keep
        self.model, self.folder, self.tasks = first.model, first.folder, first.tasks
        self._on_stage = on_stage
        self._identity = fingerprint(self.model, skip=first.all_heads)

    def run(self) -> StreamResult:
        """Go from the untrained model to the last stage; where that fails, put the model back.

        Raises:
            ArtifactError: the folder holds something else than this stream, or another process runs the stream.
            FileAccessError: the file system refuses.
        """
        with file_errors("use the folder of the stream", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with sole_user(self.folder, what="stream"):
            return self._run()

    def _run(self) -> StreamResult:
        record = self._record()
        self._check_folder(record)
        required = {name for name, p in self.model.named_parameters() if p.requires_grad}
        modes = [(module, module.training) for module in self.model.modules()]
        start = Snapshot(self.folder / "running" / f"start-{os.getpid()}.safetensors", self.model)
        write_text(self.folder / STREAM, with_digests(record.model_dump_json(indent=1)))
        try:
            result = self._run_stages(record)
        except BaseException:
            self._put_back(start)
            raise
        finally:
            start.file.unlink(missing_ok=True)
            attached = hasattr(self.model, ADAPTERS)  # then the backbone stays as the adapters left it: frozen
            for name, parameter in self.model.named_parameters():
                restored = name in required and (not attached or name in self.first.all_heads)
                parameter.requires_grad_(restored or f"{ADAPTERS}." in name)
                parameter.grad = None
            for module, mode in modes:
                module.training = mode
        shutil.rmtree(self.folder / "running", ignore_errors=True)
        for file in self._small_files():
            remove_leftovers(file)
        return result

    def _small_files(self) -> list[Path]:
        return [self.folder / name for name in (STREAM, BASELINE)]

    def _run_stages(self, record: StreamRecord) -> StreamResult:
        if not on_cpu(self.first.training.device):  # the Trainer would move the model there after the first scores
            self.model.to("cuda" if torch.cuda.is_available() else "mps")
        self.strategy.begin(self.first)
        self._measure_baseline()
        reference, current = self._snapshot(), digest(self.model)
        done = self._finished(record.stages)
        if done:
            for index in range(0 if self.keep else done - 1, done):
                Change.load(stage_folder(self.folder, index) / CHANGE).apply(self.model)
            for index in range(done):
                self._report(index)
            if self.keep:
                reference, current = self._snapshot(), digest(self.model)
        for index in range(done, record.stages):
            after = self._run_stage(self.first.at(index), reference, current)
            self._report(index)
            if self.keep:
                reference, current = self._snapshot(), after
            elif index:
                shutil.rmtree(stage_folder(self.folder, index - 1) / CHANGE, ignore_errors=True)
        reference.file.unlink(missing_ok=True)
        return StreamResult.load(self.folder)

    def _run_stage(self, stage: Stage, reference: Snapshot, digest_then: str) -> str:
        """Tune, evaluate and store one stage.

        Args:
            stage: the stage.
            reference: the last state that stays stored.
            digest_then: digest of that state.

        Returns:
            Digest of the model's state afterwards.
        """
        before = reference if self.keep or not stage.index else self._snapshot("before")
        tuned = self._tune(stage)
        change = Change.between(reference, digest_then, self.model)
        own = change if before is reference else Change.between(before, "", self.model)
        self._finish_stage(stage, tuned, change, own)
        return change.record.after

    def _tune(self, stage: Stage) -> TunedStage:
        """Let the strategy tune a stage, after removing what a killed process had half written of it."""
        remove_leftovers(stage_folder(self.folder, stage.index), STAGE_FILES)
        draft = stage.running / MEMORY
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        return self.strategy.tune(stage)

    def _finish_stage(self, stage: Stage, tuned: TunedStage, change: Change, own: Change) -> None:
        """Evaluate the model, and store everything of a stage in one step.

        Args:
            stage: the stage.
            tuned: what the strategy did in it.
            change: from the last stored state to now.
            own: from the state before this stage to now.
        """
        start = time.perf_counter()
        scores, general = self._scores()
        together = self.strategy.stages(stage) != len(self.tasks)
        core, reported = tuned.core, [part for part in (tuned.structure, tuned.core) if part is not None]
        if core is None and tuned.merged:
            changed = {name: own.positions(name) for name in stage.tensors if name in own.record.tensors}
            core = Core(changed, stage.tensors, f"changed by {self.strategy.kind}")
            reported.append(core)
        with whole_folder(stage_folder(self.folder, stage.index), files=STAGE_FILES) as new:
            change.write(new / CHANGE)
            shutil.move(stage.running / MEMORY, new / MEMORY)
            if core is not None:
                save_core(core, new / MEMORY, self._identity)
            adapter = sum(f.stat().st_size for f in (new / MEMORY / ADAPTER).glob("*"))
            record = StageRecord(
                task="all tasks" if together else stage.task.name,
                scores=scores,
                general=general,
                elements=tuned.elements,
                tensors=None if core is None else len(core.indices),
                seconds=round(tuned.seconds, 2),
                probe_seconds=round(tuned.probe_seconds, 2),
                evaluation_seconds=round(time.perf_counter() - start, 2),
                bytes=adapter or own.nbytes,
                state=change.record.after,
                report="\n\n".join(map(str, reported)),
            )
            tensors = {f"{MEMORY}/{file.name}": file_digest(file) for file in (new / MEMORY).glob("*.safetensors")}
            (new / STAGE).write_text(with_digests(record.model_dump_json(indent=1), tensors), encoding="utf-8")
        shutil.rmtree(stage.running, ignore_errors=True)

    def _report(self, index: int) -> None:
        if self._on_stage is not None:
            self._on_stage(StreamResult.load(self.folder, stages=index + 1))

    def _measure_baseline(self) -> None:
        """Score the untrained model, unless a run of this stream did so before."""
        file = self.folder / BASELINE
        if not file.exists():
            self.first.watch("untrained scores")
            scores, general = self._scores()
            write_text(file, with_digests(BaselineRecord(scores=scores, general=general).model_dump_json(indent=1)))

    def _scores(self) -> tuple[list[float], float | None]:
        scores = []
        for index, task in enumerate(self.tasks):
            with self.strategy.serving(self.first.at(index)):
                scores.append(task.score(self.model))
        general = None if self.tasks.general is None else self.tasks.general.score(self.model)
        return scores, general

    def _snapshot(self, name: str = "reference") -> Snapshot:
        return Snapshot(self.folder / "running" / f"{name}.safetensors", self.model)

    def _finished(self, stages: int) -> int:
        """How many stages are finished."""
        return next((i for i in range(stages) if not (stage_folder(self.folder, i) / STAGE).exists()), stages)

    def _record(self) -> StreamRecord:
        setup, general = self.first, self.tasks.general
        return StreamRecord(
            tasks=[task.identity() for task in self.tasks],
            general=None if general is None else general.identity(),
            strategy=self.strategy.identity(),
            training=setup.training.model_dump(mode="json", exclude={"checkpoint_steps"}),
            seed=setup.training.seed,
            keep=self.keep,
            base=digest(self.model),
            elements=sum(info.numel for info in setup.tensors.values()),
            stages=self.strategy.stages(setup),
            versions=versions(),
        )

    def _check_folder(self, record: StreamRecord) -> None:
        """Check that the folder is empty or holds this stream.

        Raises:
            ArtifactError: naming what differs.
        """
        file = self.folder / STREAM
        if not file.exists():
            held = sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else []
            ours = {"running", *(left.name for file in self._small_files() for left in leftovers(file))}
            held = [name for name in held if name not in ours]
            if held:
                raise ArtifactError(
                    "the folder holds files of others",
                    expected="a new or an empty folder, or a stream to go on with",
                    got=", ".join(held[:3]),
                    where=self.folder,
                    fix="give another folder",
                )
            return
        earlier = read_stream_record(self.folder).model_dump(mode="json")
        mine = record.model_dump(mode="json")
        for part in ("tasks", "general", "strategy", "training", "keep", "base", "version"):
            if earlier.get(part) != mine[part]:
                key, expected, got = difference(earlier.get(part), mine[part])
                raise ArtifactError(
                    f"the folder holds a stream with other {_WORDS.get(part, part)}",
                    expected=expected,
                    got=got,
                    where=f"{file}: {part}{key}",
                    fix="go on with the same arguments, or give another folder",
                )

    def _put_back(self, start: Snapshot) -> None:
        """Detach whatever is attached, and restore the model as it was."""
        delta = find_delta(self.model)
        if delta is not None:
            delta.write()
            delta.remove()
        if hasattr(self.model, ADAPTERS):
            detach(self.model)
        if {name for name, _ in start.tensors()} == {name for name, _ in state_of(self.model)}:
            start.restore(self.model)


_WORDS = {"tasks": "tasks, or in another order", "base": "weights to start from"}
