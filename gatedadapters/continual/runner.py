"""Task after task on one model, evaluated after each, killed and resumed at any moment to the same bits."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gatedadapters.backbone.fingerprint import fingerprint
from gatedadapters.config import ProbeConfig, SearchSpace, StreamTrainingConfig
from gatedadapters.continual.core import Core, save_core
from gatedadapters.continual.digests import difference
from gatedadapters.continual.fitting import Penalty, Recipe, fit, phase_seed
from gatedadapters.continual.probing import Probe, probe
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
    stage_folder,
)
from gatedadapters.continual.states import Change, Snapshot, digest, state_of
from gatedadapters.continual.strategies import Strategy, Tuned, resolve
from gatedadapters.continual.tasks import Task, TaskStream
from gatedadapters.continual.tensors import tensors_of
from gatedadapters.errors import ArtifactError, AttachError, ConfigError
from gatedadapters.masking.delta import find_delta
from gatedadapters.reporting.versions import versions
from gatedadapters.safe_files import leftovers, whole_folder
from gatedadapters.structure import Structure
from gatedadapters.supernet.adapters import Adapters, get_adapters
from gatedadapters.supernet.attach import attach, check_no_adapters, detach, find_heads
from gatedadapters.supernet.supernet import NAME as ADAPTERS
from gatedadapters.training.devices import on_cpu

Watch = Callable[[str], None]
OnStage = Callable[[StreamResult], None]


def run_stream(
    model: nn.Module,
    tasks: TaskStream | Sequence[Task],
    strategy: str | Mapping[str, Any] | Strategy = "l2_fisher",
    *,
    training: StreamTrainingConfig | None = None,
    folder: str | Path | None = None,
    keep: bool = True,
    watch: Watch | None = None,
    on_stage: OnStage | None = None,
) -> StreamResult:
    """Tune `model` on task after task, in place, and measure what each did to all of them.

    Afterwards the model is in its last state. With `folder`, everything needed to go on is stored as the stream
    proceeds: called again with the same arguments and the untrained model, a stream that was killed ends with the same
    bits as one that was not, and one that is finished is read, its last state put into the model.

    Heads of tasks (`Task.heads`) are trained with their task under every strategy; they are counted neither as core nor
    as trained elements. Everything else that a strategy does not select is bit-frozen. Whether a parameter required
    gradients before plays no part (`sequential` also moves what was frozen; to keep tensors fixed, select with
    `core.exclude`), and is afterwards as it was; under adapters that a strategy leaves attached the backbone is frozen.

    Args:
        model: untrained, without adapters or a delta; a `MultiTaskClassifier`, a causal language model, or whatever the
            tasks can score.
        tasks: in the order they come.
        strategy: a name, its options with the name as `kind`, or a `Strategy`.
        training: how long and how fast each task is tuned.
        folder: for a stream that can go on and whose states can be restored.
        keep: store what each task changed; False stores the last state alone.
        watch: called with a line about what comes next.
        on_stage: called with the stream so far after each stage, those included that a resumed stream finds finished;
            for example `TensorBoardWriter(...).stream`.

    Raises:
        TaskError, DataError, ConfigError: tasks or options that do not go together, or several processes, before any
            compute.
        ArtifactError: the folder holds a stream of other tasks, another order, or other settings.

    Whatever training raises passes through; the model is then bit for bit what it was, and the folder can be gone
    on with.
    """
    stream = tasks if isinstance(tasks, TaskStream) else TaskStream(tasks)
    chosen = resolve(dict(strategy) if isinstance(strategy, Mapping) else strategy)
    with tempfile.TemporaryDirectory(prefix="gatedadapters-") as scratch:
        place = Path(folder) if folder is not None else Path(scratch) / "stream"
        run = Run(
            model, stream, chosen, training or StreamTrainingConfig(), place, keep=keep, watch=watch, on_stage=on_stage
        )
        result = run.run()
    if folder is None:
        result.folder = None
    return result


class Run:
    """A stream as strategies see it.

    Attributes:
        model, stream, strategy, training, seed: what was asked for.
        heads: names of the parameters of each task's head.
        all_heads: of all of them, and of heads that no task of the stream uses.
        infos: every tensor of the backbone.
        identity: fingerprint of the untrained model.
        sample: one example as a batch, without its label.
        now: index of the task that is being tuned.
    """

    def __init__(
        self,
        model: nn.Module,
        stream: TaskStream,
        strategy: Strategy,
        training: StreamTrainingConfig,
        folder: Path,
        *,
        keep: bool,
        watch: Watch | None = None,
        on_stage: OnStage | None = None,
    ) -> None:
        self.model, self.stream, self.strategy, self.training = model, stream, strategy, training
        self._use_cpu = on_cpu(training.device)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ConfigError(
                "a stream is run by one process",
                expected="WORLD_SIZE 1",
                got=os.environ["WORLD_SIZE"],
                where="run_stream",
                fix="start it without torchrun; several streams may run side by side",
            )
        self.folder, self.keep, self.seed, self.now = folder, keep, training.seed, 0
        self._watch, self._on_stage = watch or (lambda _: None), on_stage
        if find_delta(model) is not None:
            raise AttachError(
                "a stream starts from a plain model",
                expected="no sparse delta",
                got="model.sparse_delta",
                where="run_stream",
                fix="remove or merge it first",
            )
        check_no_adapters(model)
        self.heads = stream.check(model)
        own = find_heads(model, None) if any(task.classes for task in stream) else ()
        self.all_heads = frozenset(name for names in (*self.heads, own) for name in names)
        device = next(model.parameters()).device
        batch = stream[0].collate([stream[0].train[0]])
        self.sample = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        self.infos = tensors_of(model, self.all_heads, self.sample)
        self.identity = self.fingerprint()
        strategy.check(self)

    # -- what strategies use -------------------------------------------------------------------------------------------

    @property
    def running(self) -> Path:
        """Folder for what is under way in this stage; removed when it is finished."""
        return self.folder / "running" / f"{self.now:03d}"

    def memory(self, index: int) -> Path:
        """What the strategy remembered of a finished stage."""
        return stage_folder(self.folder, index) / MEMORY

    def fingerprint(self) -> Any:
        """Of the backbone as it is now."""
        return fingerprint(self.model, skip=self.all_heads)

    def phase_seed(self, index: int) -> int:
        """A seed for what a task draws once, equal under every strategy."""
        return phase_seed(self.seed, f"draw {self.stream[index].name}")

    def attach(self, space: SearchSpace | Structure, *, seed: int) -> Adapters:
        """Attach adapters of one task, whatever ids the model's heads go by."""
        adapters = attach(self.model, space, self.sample, heads=sorted(self.all_heads), seed=seed)
        adapters.follows_ids = False
        return adapters

    def adapters(self) -> Adapters:
        """What is attached."""
        return get_adapters(self.model)

    def require(self, names: Iterable[str], *indices: int) -> int:
        """Let these tensors and the heads of these tasks be trained, and nothing else; elements, heads not counted."""
        wanted = set(names)
        heads = {name for index in indices for name in self.heads[index]}
        count = 0
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in wanted or name in heads)
            count += parameter.numel() if name in wanted else 0
        return count

    def require_heads(self, *indices: int) -> None:
        """Of all heads, let those of these tasks be trained; the rest of the model is left as it is."""
        wanted = {name for index in indices for name in self.heads[index]}
        for name in self.all_heads:
            self.model.get_parameter(name).requires_grad_(name in wanted)

    def fit(
        self,
        index: int,
        *,
        data: Any = None,
        heads_of: Iterable[int] | None = None,
        penalty: Penalty | None = None,
        length: int = 1,
        phase: str = "task",
        steps: int | None = None,
        gated: dict[str, Any] | None = None,
    ) -> float:
        """Train what requires gradients on a task; the seconds that it took.

        Args:
            index: of the task.
            data: in place of its training data.
            heads_of: tasks whose heads have the heads' learning rate; default: this one.
            penalty: added to the loss.
            length: times the configured steps.
            phase: tells several trainings of one stage apart.
            steps: in place of the configured number.
            gated: options of `GatedTrainer`.
        """
        task, training = self.stream[index], self.training
        self._watch(f"{task.name}: {phase}")
        heads = [n for i in (range(index, index + 1) if heads_of is None else heads_of) for n in self.heads[i]]
        return fit(
            self.model,
            task.train if data is None else data,
            task.collate,
            self.recipe((steps or training.steps) * length),
            folder=self.running / phase,
            seed=phase_seed(self.seed, f"{phase} {task.name}"),
            heads=heads,
            penalty=penalty,
            gated=gated,
        )

    def recipe(self, steps: int) -> Recipe:
        """The configured training."""
        t = self.training
        return Recipe(
            steps,
            t.batch_size,
            t.learning_rate,
            t.head_learning_rate,
            "linear",
            t.warmup,
            t.weight_decay,
            t.precision == "bf16",
            self._use_cpu,
            t.checkpoint_steps,
        )

    def probe(self, index: int, config: ProbeConfig, *, elements: bool) -> Probe:
        """A warm start of a task from the model as it is; read where it was taken already."""
        task = self.stream[index]
        self._watch(f"{task.name}: probe")
        return probe(
            self.model,
            task,
            self.folder / "probes" / f"{index:03d}",
            config,
            heads=self.all_heads,
            own_head=frozenset(self.heads[index]),
            elements=elements,
            seed=phase_seed(self.seed, task.name),
            recipe=self.recipe(1),
        )

    def batches(self, index: int, size: int) -> Iterator[dict[str, Tensor]]:
        """Training data of a task in shuffled batches, once."""
        task = self.stream[index]
        yield from DataLoader(
            task.train,
            size,
            shuffle=True,
            collate_fn=task.collate,
            generator=torch.Generator().manual_seed(phase_seed(self.seed, f"batches {task.name}")),
        )

    def snapshot(self, name: str) -> Snapshot:
        """A copy of the model's state, in a file of this stage."""
        return Snapshot(self.running / f"{name}.safetensors", self.model)

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Write values into parameters."""
        for name, value in values.items():
            self.model.get_parameter(name).copy_(value)

    def write(self, file: Path, text: str) -> None:
        """A small file, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.{os.getpid()}")
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)

    # -- the stream ----------------------------------------------------------------------------------------------------

    def run(self) -> StreamResult:
        """From the untrained model to the last stage; the model is put back where that fails."""
        record = self._record()
        self._check_folder(record)
        required = {name for name, p in self.model.named_parameters() if p.requires_grad}
        modes = [(module, module.training) for module in self.model.modules()]
        start = Snapshot(self.folder / "running" / f"start-{os.getpid()}.safetensors", self.model)
        self.write(self.folder / STREAM, record.model_dump_json(indent=1) + "\n")
        try:
            result = self._stages(record)
        except BaseException:
            self._put_back(start)
            raise
        finally:
            start.file.unlink(missing_ok=True)
            attached = hasattr(self.model, ADAPTERS)  # the backbone under them stays as they left it: frozen
            for name, parameter in self.model.named_parameters():
                restored = name in required and (not attached or name in self.all_heads)
                parameter.requires_grad_(restored or f"{ADAPTERS}." in name)
                parameter.grad = None
            for module, mode in modes:
                module.training = mode
        shutil.rmtree(self.folder / "running", ignore_errors=True)
        for part in self._parts():
            part.unlink(missing_ok=True)
        return result

    def _parts(self) -> list[Path]:
        """Small files that a killed process was writing; see `write`."""
        return [part for name in (STREAM, BASELINE) for part in self.folder.glob(f".{name}.*")]

    def _stages(self, record: StreamRecord) -> StreamResult:
        if not self.recipe(1).use_cpu:  # so that scores of the untrained model are taken where all others are
            self.model.to("cuda")
            self.sample = {key: value.to("cuda") for key, value in self.sample.items()}
        self.strategy.begin(self)
        self._measure_baseline()
        reference, current = self._reference(), digest(self.model)
        done = self._finished(record.stages)
        if done:
            first = 0 if self.keep else done - 1
            for index in range(first, done):
                Change.load(stage_folder(self.folder, index) / CHANGE).apply(self.model)
            for index in range(done):
                if self.memory(index).is_dir():
                    self.strategy.recall(self, index, self.memory(index))
                self._tell(index)
            if self.keep:
                reference, current = self._reference(), digest(self.model)
        for index in range(done, record.stages):
            for left in leftovers(stage_folder(self.folder, index)):  # of a process that was killed as it wrote
                shutil.rmtree(left, ignore_errors=True)
            self.now = index
            before = reference if self.keep or not index else self._reference("before")
            tuned = self.strategy.tune(self, index)
            change = Change.between(reference, current, self.model)
            own = change if before is reference else Change.between(before, "", self.model)
            self._finish_stage(index, tuned, change, own)
            self._tell(index)
            if self.keep:
                reference, current = self._reference(), change.record.after
            elif index:
                shutil.rmtree(stage_folder(self.folder, index - 1) / CHANGE, ignore_errors=True)
        reference.file.unlink(missing_ok=True)
        return StreamResult.load(self.folder)

    def _finish_stage(self, index: int, tuned: Tuned, change: Change, own: Change) -> None:
        """Evaluate, and store everything of the stage in one step: `change` from the last stored state, `own` from the
        task before.
        """
        start = time.perf_counter()
        scores, general = self._scores()
        task = self.stream[index].name if self.strategy.stages(self) == len(self.stream) else "all tasks"
        core, parts = tuned.core, [part for part in (tuned.structure, tuned.core) if part is not None]
        if core is None and tuned.merged:  # what open paths touch is what the merge changed
            changed = {name: own.positions(name) for name in self.infos if name in own.record.tensors}
            core = Core(changed, self.infos, f"changed by {self.strategy.kind}")
            parts.append(core)
        tensors = len(core.indices) if core is not None else None
        with whole_folder(stage_folder(self.folder, index), files={STAGE, CHANGE, MEMORY}) as new:
            change.write(new / CHANGE)
            (new / MEMORY).mkdir()
            self.strategy.remember(self, index, new / MEMORY)
            if core is not None and core is not tuned.core:
                save_core(core, new / MEMORY, self.identity)
            adapter = sum(f.stat().st_size for f in (new / MEMORY / ADAPTER).glob("*"))
            record = StageRecord(
                task=task,
                scores=scores,
                general=general,
                elements=tuned.elements,
                tensors=tensors,
                seconds=round(tuned.seconds, 2),
                probe_seconds=round(tuned.probe_seconds, 2),
                evaluation_seconds=round(time.perf_counter() - start, 2),
                bytes=adapter or own.nbytes,
                state=change.record.after,
                report="\n\n".join(map(str, parts)),
            )
            (new / STAGE).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(self.running, ignore_errors=True)

    def _tell(self, index: int) -> None:
        if self._on_stage is not None:
            self._on_stage(StreamResult.load(self.folder, stages=index + 1))

    def _measure_baseline(self) -> None:
        """Scores of the untrained model, computed once."""
        file = self.folder / BASELINE
        if not file.exists():
            self._watch("untrained scores")
            scores, general = self._scores()
            self.write(file, BaselineRecord(scores=scores, general=general).model_dump_json(indent=1) + "\n")

    def _scores(self) -> tuple[list[float], float | None]:
        scores = []
        for index, task in enumerate(self.stream):
            with self.strategy.serving(self, index):
                scores.append(task.score(self.model))
        general = None if self.stream.general is None else self.stream.general.score(self.model)
        return scores, general

    def _reference(self, name: str = "reference") -> Snapshot:
        return Snapshot(self.folder / "running" / f"{name}.safetensors", self.model)

    def _finished(self, stages: int) -> int:
        """How many stages are whole."""
        return next((i for i in range(stages) if not (stage_folder(self.folder, i) / STAGE).exists()), stages)

    def _record(self) -> StreamRecord:
        general = self.stream.general
        return StreamRecord(
            tasks=[task.identity() for task in self.stream],
            general=None if general is None else general.identity(),
            strategy=self.strategy.identity(),
            training=self.training.model_dump(mode="json", exclude={"checkpoint_steps"}),
            seed=self.seed,
            keep=self.keep,
            base=digest(self.model),
            elements=sum(info.numel for info in self.infos.values()),
            stages=self.strategy.stages(self),
            versions=versions(),
        )

    def _check_folder(self, record: StreamRecord) -> None:
        """See that what the folder holds is this stream.

        Raises:
            ArtifactError: naming what differs.
        """
        file = self.folder / STREAM
        if not file.exists():
            held = sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else []
            held = [name for name in held if name not in ("running", *(part.name for part in self._parts()))]
            if held:
                raise ArtifactError(
                    "the folder holds files of others",
                    expected="a new or an empty folder, or a stream to go on with",
                    got=", ".join(held[:3]),
                    where=self.folder,
                    fix="give another folder",
                )
            return
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(
                "the record of a stream cannot be read", got=error, where=file, fix="give another folder"
            ) from error
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
        """The model as it was, whatever is attached."""
        delta = find_delta(self.model)
        if delta is not None:
            delta.write()
            delta.remove()
        if hasattr(self.model, ADAPTERS):
            detach(self.model)
        if {name for name, _ in start.tensors()} == {name for name, _ in state_of(self.model)}:
            start.restore(self.model)


_WORDS = {"tasks": "tasks, or in another order", "base": "weights to start from"}
