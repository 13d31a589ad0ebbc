"""Scoring a model: one call over a stream of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatedadapters.backbone.attached import unpacked
from gatedadapters.backbone.fingerprint import fingerprint, is_own
from gatedadapters.backbone.quantized import is_quantized
from gatedadapters.errors import MaskError
from gatedadapters.masking.roles import matching_parameters, parameter_roles
from gatedadapters.masking.scores import Batch, Loss, Score, Scores, ScoringRun, score_class
from gatedadapters.masking.scores.losses import task_losses
from gatedadapters.masking.scores.per_example import size_of
from gatedadapters.masking.scores.storage import ScoresRecord, allocated, file_names, sharded, write_record
from gatedadapters.runtime.sharding import first_alike, is_sharded, local, reshard
from gatedadapters.safe_files import whole_folder
from gatedadapters.supernet.attach import find_heads

_LABELS = ("labels", "label", "label_ids")


def score(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    *,
    kind: str | Score = "taylor",
    loss: Loss | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    heads: Sequence[str] | None = None,
    seed: int = 0,
    spill: str | Path | None = None,
    overwrite: bool = False,
) -> Scores:
    """Score how important every element of the backbone is for the task in `batches`.

    The model runs in evaluation mode, without dropout, and every bit of it is restored. Batches are consumed one at a
    time and not kept. Beside the model and the activations of a batch, memory holds the scores in fp32 and one tensor.

    Of a sharded model, every process calls this, and holds the scores and, for one batch, the gradients of its shards.
    Batches of the same number count as one batch: give every process the same ones for the scores of one process.

    Args:
        model: any transformers model, or a module that is called as `model(**batch)`; without a delta in it.
        batches: dictionaries of tensors, such as a DataLoader yields. Kinds that read weights alone need none.
        kind: `taylor`, `fisher`, `consistency`, `synaptic`, `mas`, `magnitude`, `random`, or a `Score` of your own.
        loss: `(model, batch) -> (examples,)`, one loss per example. Default: `scores.losses.task_losses`, or for `mas`
            the squared norm of the output.
        include: roles or names (with * and ?) of the parameters to score; default: the whole backbone.
        exclude: which of these to leave out.
        heads: task heads, which are trained in full and not scored; default: as in `attach`.
        seed: seed of kinds that draw random numbers.
        spill: a folder for safetensors shards, which then hold the scores instead of memory.
        overwrite: replace scores that the folder holds.

    Raises:
        MaskError: there is no data, gradients are not finite, all scores are 0, the kind is unknown, a pattern matches
            nothing, weights are integers or quantised, or the model has a delta in it. The model is not changed then.
        ArtifactError: the folder is not free.
    """
    method = score_class(kind)() if isinstance(kind, str) else kind
    if any("sparse_delta" in name.split(".") for name, _ in model.named_modules()):
        raise MaskError(
            "this model has a sparse delta in it",
            expected="the backbone alone",
            got="model.sparse_delta",
            where="score",
            fix="model.sparse_delta.remove() or .merge() first",
        )
    head_names = find_heads(model, heads)
    stream = iter(batches) if batches is not None and method.needs_data else iter([{}] if not method.needs_data else [])
    first = next(stream, None)
    if first is None:
        raise MaskError(
            "there is no data to score by",
            expected="at least one batch",
            got="none" if batches is not None else "batches=None",
            where=f"score(kind={method.kind!r})",
            fix="pass a DataLoader or a list of batches; a generator is used up after one pass",
        )
    home = next(model.parameters()).device
    sample = {k: v[:1].to(home) for k, v in first.items() if isinstance(v, Tensor) and v.dim() > 0 and k not in _LABELS}
    roles = parameter_roles(model, sample or None)
    own = {n: r for n, r in roles.items() if n not in head_names and not is_own(n)}
    names = matching_parameters(own, include, exclude, where="score")
    reshard(model)
    everything = dict(model.named_parameters())
    parameters = {name: everything[name] for name in names}
    for name, parameter in parameters.items():
        if is_quantized(parameter) or parameter.element_size() < 2:
            raise MaskError(
                "these weights have no gradients",
                expected="floating-point parameters of 16 bits or more",
                got=str(parameter.dtype),
                where=name,
                fix="load the model without quantisation, or exclude=[...] them",
            )
    if spill is not None and is_sharded(model):
        raise MaskError(
            "the scores of a sharded model lie with its shards, not in a folder",
            expected="spill=None",
            got=repr(spill),
            where="score(spill=)",
            fix="leave it out; scores.save(folder) writes them afterwards",
        )
    entries = sharded({name: tuple(p.shape) for name, p in parameters.items()}, own)
    record = ScoresRecord(kind=method.kind, fingerprint=fingerprint(model, skip=frozenset(head_names)), tensors=entries)
    with ExitStack() as stack:
        if spill is not None:
            shards = 1 + max(entry.shard for entry in entries.values())
            folder = stack.enter_context(whole_folder(spill, files=file_names(shards, spill), overwrite=overwrite))
            totals = stack.enter_context(allocated(record, folder))
        else:
            totals = {
                name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False)
                for name, p in parameters.items()
            }
        held = {name: local(total) for name, total in totals.items()}
        run = ScoringRun(model, parameters, held, loss or method.default_loss() or task_losses, seed)
        with unpacked(model), _prepared(model, parameters):
            try:
                method.begin(run)
                _accumulate(method, run, first, stream, home)
                method.finish(run)
            finally:
                method.end(run)
        _check(run, method)
        record = record.model_copy(
            update={
                "batches": run.batches if method.needs_data else 0,
                "examples": run.examples,
                "details": run.details,
            }
        )
        if spill is not None:
            write_record(record, folder)
    return Scores(record, totals) if spill is None else Scores.load(spill, verify=False)


def _accumulate(method: Score, run: ScoringRun, first: Batch, rest: Iterator[Batch], home: torch.device) -> None:
    """Let the score add up all batches."""
    batch: Batch | None = first
    while batch is not None:
        moved = {k: v.to(home) if isinstance(v, Tensor) else v for k, v in batch.items()}
        if method.needs_data:
            run.examples += size_of(moved)
        run.batches += 1
        with torch.enable_grad():
            method.batch(run, moved)
        batch = next(rest, None)


@contextmanager
def _prepared(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """A context with the model in evaluation mode and gradients for `parameters` alone; it restores everything."""
    reshard(model)
    modes = [(module, module.training) for module in model.modules()]
    held: list[tuple[nn.Parameter, bool, Tensor | None]] = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    scored = {id(p) for p in parameters.values()}
    model.eval()
    for parameter, _, _ in held:
        parameter.grad = None
        parameter.requires_grad_(id(parameter) in scored)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, required, grad in held:
            parameter.requires_grad_(required)
            parameter.grad = grad


def _check(run: ScoringRun, method: Score) -> None:
    """Check that all scores are finite, at least 0, and not all 0."""
    largest, broken = 0.0, list[tuple[str, str]]()
    for name, total in run.totals.items():
        top: Any = total.amax() if total.numel() else total.new_zeros(())
        low: Any = total.amin() if total.numel() else top
        if not bool(torch.isfinite(top)) or float(low) < 0 or not bool(torch.isfinite(low)):
            broken.append((name, f"between {float(low):.3g} and {float(top):.3g}"))
        largest = max(largest, float(top))
    for name, got in first_alike(broken, run.model):
        raise MaskError(
            "a score is not a finite number of at least 0",
            expected="finite scores",
            got=got,
            where=f"{name} ({method.kind})",
            fix="look for examples with an infinite loss",
        )
    if not first_alike([largest] if largest else [], run.model):
        raise MaskError(
            "all scores are 0",
            expected="a loss that depends on the weights",
            got="no gradient anywhere",
            where=f"{method.kind}, {run.batches} batches",
            fix="check the labels: are all of them ignored (-100)?",
        )
