"""The probe: which tensors a task moves, seen in a short full fine-tuning that is then undone, or in its gradients."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from gatedadapters.artefact_files import check_tensors, with_digests, write_tensors
from gatedadapters.config import ProbeConfig
from gatedadapters.config.base import Config, read_record
from gatedadapters.continual.digests import difference
from gatedadapters.continual.fitting import CHECKPOINT_STEPS, Recipe, fit, phase_seed
from gatedadapters.continual.states import Snapshot, digest, state_of
from gatedadapters.continual.tasks import Task, first_example
from gatedadapters.continual.tensors import tensors_of
from gatedadapters.errors import ArtifactError
from gatedadapters.masking import Scores, score
from gatedadapters.masking.scores import Batch
from gatedadapters.masking.scores.base import BatchScore, Loss, ScoringRun
from gatedadapters.masking.scores.losses import token_losses
from gatedadapters.paths.precision import widened
from gatedadapters.safe_files import remove_leftovers, whole_folder
from gatedadapters.untrusted import load_json

RECORD, DELTAS, FISHER = "probe.json", "deltas.safetensors", "fisher"
REQUEST = "request.json"
PROBE_FILES = frozenset({RECORD, DELTAS, FISHER})


class ProbeRecord(Config):
    """A probe as data. θ_start are the weights before it, θ_warm the weights at the end of its training. A probe by
    gradients takes no step: θ_warm is θ_start, and the mean gradient with its sign changed is its update Δ, as of one
    step of gradient descent. Of a training, Δ is θ_warm - θ_start.

    Attributes:
        version: of the format.
        task: name of the task.
        start: digest of the model that was probed.
        seed: of the order of the data.
        config: how long and how fast.
        steps: optimiser steps that were taken.
        examples: how many training examples were used: trained on, or else those of the gradients.
        seconds: that the probe took, squared gradients included. If it was stopped, those of its last part.
        norms: ‖Δ‖₂ of every tensor, computed in double precision.
        fisher: mean squared gradient of every tensor at θ_warm.
        request: everything that the result depends on; see `probe`.
    """

    version: Literal[1] = 1
    task: str
    start: str
    seed: int
    config: ProbeConfig
    steps: int
    examples: int
    seconds: float
    norms: dict[str, float]
    fisher: dict[str, float]
    request: dict[str, Any] = Field(default_factory=dict)


class BatchFisher(BatchScore):
    """`mean_b g_b²`, where g_b is the gradient of the loss of batch b, which is the mean over its labelled tokens.

    Quantity: the squared gradient as in the released code of TRACE, over batches of 2 examples. It shrinks with the
    batch size; `Fisher` squares the gradients of single examples. Reduction: mean over batches. Sign: at least 0.

    References:
        arXiv 2605.31025, released code.
    """

    kind = "batch_fisher"

    def default_loss(self) -> Loss:
        """The loss of each example, weighted by its labelled tokens: long answers count more, as in training."""
        return token_losses

    def value(self, grad: Tensor, parameter: Tensor) -> Tensor:
        """The squared gradient."""
        return grad.to(torch.promote_types(grad.dtype, torch.float32)).square_()


class BatchGradients(BatchFisher):
    """The same, and in the same pass the mean over batches of the gradient itself.

    Attributes:
        mean: the mean gradient of every parameter, in its shape and at least float32.
    """

    def begin(self, run: ScoringRun) -> None:
        """Start at zero."""
        self.mean = {name: torch.zeros_like(run.totals[name]) for name in run.parameters}

    def _add(self, run: ScoringRun, name: str, grad: Tensor) -> None:
        self.mean[name] += grad
        super()._add(run, name, grad)

    def finish(self, run: ScoringRun) -> None:
        """Mean over batches."""
        super().finish(run)
        for total in self.mean.values():
            total /= run.batches


@dataclass(frozen=True)
class Probe:
    """A finished probe. Numbers per tensor are in memory; elements stay on disk and are read one tensor at a time.

    Attributes:
        record: the probe as data.
        folder: where it is stored.
        verify: check the digest of the squared gradients when they are read.
    """

    record: ProbeRecord
    folder: Path
    verify: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors of the backbone."""
        return tuple(self.record.norms)

    def delta(self, name: str) -> Tensor:
        """The update Δ of one tensor, in its shape, read as float32; see `ProbeRecord`."""
        with safe_open(self.folder / DELTAS, framework="pt") as stored:
            found: Tensor = stored.get_tensor(name)
        return found.float()

    def squared_gradients(self) -> Scores:
        """The mean squared gradient of every element at θ_warm. The scores stay on disk.

        Raises:
            ArtifactError: the probe was taken with `elements=False`.
        """
        if not (self.folder / FISHER).is_dir():
            raise ArtifactError(
                "this probe holds no squared gradients by element",
                expected="probe(elements=True)",
                got="elements=False",
                where=self.folder,
                fix="probe again",
            )
        return Scores.load(self.folder / FISHER, verify=self.verify)

    @classmethod
    def load(cls, folder: str | Path, *, verify: bool = True) -> Self:
        """Read what `probe` wrote.

        Args:
            folder: the folder.
            verify: check the digests of the files, which tell damage; this reads them once.

        Raises:
            ArtifactError: files are missing, damaged or of another kind.
        """
        path = Path(folder)
        record, file = read_record(
            ProbeRecord,
            path / RECORD,
            what="a probe",
            expected=f"{RECORD} and {DELTAS}",
            fix="give the folder that probe wrote",
            verify=verify,
        )
        names = set(check_tensors(path / DELTAS, file.digest(DELTAS)))
        if names != set(record.norms):
            raise ArtifactError(
                "the deltas of a probe are not those of its record",
                expected=f"{len(record.norms)} tensors",
                got=f"{len(names)}",
                where=path,
                fix="keep the files together",
            )
        return cls(record, path, verify)


def probe(
    model: nn.Module,
    task: Task,
    folder: str | Path,
    config: ProbeConfig | None = None,
    *,
    heads: frozenset[str] = frozenset(),
    own_head: frozenset[str] = frozenset(),
    elements: bool = False,
    seed: int = 0,
    recipe: Recipe | None = None,
) -> Probe:
    """Measure which weights a task moves, and leave every bit of the model as it is.

    A probe of kind `training` fine-tunes all of `model` for a short while, stores the update and the squared gradients
    at its end, and puts the model back. One of kind `gradient` stores the mean gradient, with its sign changed, and the
    squared gradients of the model as it is, both from one pass over a few batches.

    A probe that was stopped, also by SIGKILL, goes on when it is called again with the same arguments. A finished probe
    is read. A training takes the memory of full fine-tuning, and a copy of the model lies on disk meanwhile; gradients
    take one more copy of the model in memory.

    Args:
        model: without adapters or a delta in it.
        task: the task to probe.
        folder: for the result; while the probe runs, `FOLDER.running` beside it holds checkpoints.
        config: how long and how fast.
        heads: names of the parameters of all tasks' heads, which are not part of the backbone.
        own_head: names of the parameters of this task's head, which is trained along.
        elements: store the squared gradient of every element, which selection by element needs.
        seed: of the order of the data.
        recipe: for its number format, device, rate of heads and checkpoints; default: float32, a GPU where there is
            one, one rate for all, a checkpoint every 200 steps.

    Raises:
        ArtifactError: the folder holds a probe, finished or not, of another model, task, data, heads or configuration,
            or one with another `elements`.

    References:
        arXiv 2605.31025 (TRACE), released code: one epoch of full fine-tuning at 2e-5, the warm model is only a probe.
    """
    config, path = config or ProbeConfig(), Path(folder)
    begin, start, running = time.perf_counter(), digest(model), path.with_name(f"{path.name}.running")
    base = recipe or Recipe(1, config.batch_size, config.learning_rate, checkpoint_steps=CHECKPOINT_STEPS)
    request = {
        "task": task.identity(),
        "start": start,
        "seed": seed,
        "config": config.model_dump(mode="json"),
        "heads": sorted(heads),
        "own_head": sorted(own_head),
        "elements": elements,
        "training": {"head_learning_rate": base.head_learning_rate, "bf16": base.bf16},
    }
    remove_leftovers(path, PROBE_FILES)
    remove_leftovers(running, {REQUEST})
    if path.is_dir() and any(path.iterdir()):
        earlier = Probe.load(path)
        _check_request(earlier.record.request, request, path)
        shutil.rmtree(running, ignore_errors=True)
        return earlier
    infos = tensors_of(model, heads, first_example(model, task))
    _claim(running, request)
    with ExitStack() as stack:
        if config.kind == "training":
            before = stack.enter_context(_undone(model, running))
            data = _random_part(task.train, config.fraction, seed)
            own = _recipe(config, len(data), base)
            _train(model, data, task, set(infos), own_head, own, running, seed)
            steps, examples = own.steps, len(data)
        new = stack.enter_context(whole_folder(path, files=PROBE_FILES))
        method = BatchFisher() if config.kind == "training" else BatchGradients()
        batches = _fisher_batches(task, config, seed)
        device = next(model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=base.bf16):
            found = score(model, batches, kind=method, heads=sorted(heads), spill=new / FISHER)
        if isinstance(method, BatchGradients):
            steps, examples = 0, found.record.examples
            updates: Iterable[tuple[str, Tensor]] = ((name, -method.mean[name]) for name in infos)
        else:
            updates = _updates(before, model, set(infos))
        norms, stored = _write_deltas(new / DELTAS, updates, config)
        fisher = {name: float(widened(found[name]).mean()) for name in infos}
        if not elements:
            del found
            shutil.rmtree(new / FISHER)
        record = ProbeRecord(
            task=task.name,
            start=start,
            seed=seed,
            config=config,
            steps=steps,
            examples=examples,
            seconds=round(time.perf_counter() - begin, 2),
            norms={name: norms[name] for name in infos},  # in the order of the model
            fisher=fisher,
            request=request,
        )
        text = json.dumps(record.model_dump(mode="json"), indent=1)
        (new / RECORD).write_text(with_digests(text, {DELTAS: stored}), encoding="utf-8")
    shutil.rmtree(running)
    return Probe.load(path)


def _claim(running: Path, wanted: dict[str, Any]) -> None:
    """Make the folder of the running probe, or check that it belongs to a probe with this request.

    Raises:
        ArtifactError: it belongs to another one.
    """
    file = running / REQUEST
    if file.exists():
        _check_request(load_json(file.read_text(encoding="utf-8")), wanted, running)
        return
    shutil.rmtree(running, ignore_errors=True)
    with whole_folder(running, files={REQUEST}) as new:
        (new / REQUEST).write_text(json.dumps(wanted) + "\n", encoding="utf-8")


def _check_request(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Raise an `ArtifactError` where the request of a stored probe differs from the one that is wanted."""
    if found != wanted:
        key, there, own = difference(found, wanted)
        raise ArtifactError(
            f"the folder holds another probe: its {key.removeprefix('.')} differs",
            expected=own,
            got=there,
            where=where,
            fix="give another folder, or remove this one",
        )


def _random_part(data: Any, fraction: float, seed: int) -> Any:
    """A share of a data set, drawn at random."""
    if fraction == 1.0:
        return data
    count = max(1, round(fraction * len(data)))
    return Subset(data, torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count].tolist())


def _fisher_batches(task: Task, config: ProbeConfig, seed: int) -> Iterator[Batch]:
    """At most `fisher_batches` batches of the training data, to measure squared gradients on."""
    loader: DataLoader[Any] = DataLoader(
        task.train,
        config.fisher_batch_size,
        shuffle=True,
        collate_fn=task.collate,
        generator=torch.Generator().manual_seed(seed),
    )
    for _, batch in zip(range(config.fisher_batches), loader, strict=False):
        yield batch


@contextmanager
def _undone(model: nn.Module, running: Path) -> Iterator[Snapshot]:
    """A context that puts every bit, flag and mode of the model back at its end; it yields the state at its start."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    snapshot = Snapshot(running / "start.safetensors", model)
    try:
        yield snapshot
    finally:
        snapshot.restore(model)
        for parameter, wanted in required:
            parameter.requires_grad_(wanted)
            parameter.grad = None
        for module, mode in training:
            module.training = mode


def _train(
    model: nn.Module,
    data: Any,
    task: Task,
    names: set[str],
    own_head: frozenset[str],
    recipe: Recipe,
    running: Path,
    seed: int,
) -> None:
    """Fine-tune all of the backbone and the task's head."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names or name in own_head)
    heads, seed = sorted(own_head), phase_seed(seed, f"probe {task.name}")
    fit(model, data, task.collate, recipe, folder=running, seed=seed, heads=heads)
    for parameter in model.parameters():
        parameter.grad = None  # frees the memory that the squared gradients take next


def _recipe(config: ProbeConfig, examples: int, base: Recipe) -> Recipe:
    """The training of a probe."""
    return replace(
        base,
        steps=config.steps or math.ceil(config.epochs * math.ceil(examples / config.batch_size)),
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        schedule="cosine",
        warmup=config.warmup,
        weight_decay=0.0,
    )


@torch.no_grad()
def _updates(start: Snapshot, model: nn.Module, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The change of every named tensor since the snapshot, float32."""
    current = dict(state_of(model))
    for name, before in start.tensors():
        if name in names:
            yield name, current[name].detach().cpu().float() - before.float()


@torch.no_grad()
def _write_deltas(
    file: Path, updates: Iterable[tuple[str, Tensor]], config: ProbeConfig
) -> tuple[dict[str, float], str]:
    """Write the update of every tensor into a file; returns the norms of the updates by name, and the file's digest."""
    norms, deltas = {}, {}
    for name, change in updates:
        norms[name] = float(widened(change).norm())
        deltas[name] = change.to("cpu", getattr(torch, config.dtype))
    return norms, write_tensors(file, deltas, metadata={"format": "gatedadapters probe 1"})
