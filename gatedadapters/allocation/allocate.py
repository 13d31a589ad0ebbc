"""A Structure of any budget before any training: probe, score, fill."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from gatedadapters.allocation.base import PlacementScore
from gatedadapters.allocation.placement import Placement, spread_over_units, stack
from gatedadapters.allocation.probe import Probe, restored, taken
from gatedadapters.allocation.registry import placement_score
from gatedadapters.backbone import discover
from gatedadapters.backbone.fingerprint import backbone_fingerprint
from gatedadapters.config import Budget, PathOptions, SearchSpace
from gatedadapters.errors import AllocationError
from gatedadapters.masking.scores.base import Batch, Loss
from gatedadapters.masking.scores.losses import task_losses
from gatedadapters.paths import Elements, Path
from gatedadapters.structure import Structure
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import (
    DEFAULT_TASK,
    attach,
    candidates,
    check_no_adapters,
    detach,
    find_heads,
    gated_candidates,
)

Batches = Iterable[Batch]
PROBE_BATCHES = 24


def allocate(
    model: nn.Module,
    space: SearchSpace | str,
    batches: Batches | Mapping[str, Batches],
    *,
    budget: Budget,
    score: str | PlacementScore = "moved",
    probe_batches: int = PROBE_BATCHES,
    learning_rate: float = 1e-2,
    loss: Loss | None = None,
    heads: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Structure:
    """Choose a Structure that meets a budget exactly, from a short probe and before any training.

    `attach(model, structure)` then trains it like any other. The model is left as it was.

    Args:
        model: any transformers model, or a module that is called as `model(**batch)`; without adapters.
        space: a search space, or the name of a preset.
        batches: dictionaries of tensors such as a DataLoader yields; for several tasks, one stream for each by name.
        budget: what the Structure may cost at most.
        score: how candidates are judged: a kind of `allocation.score_kinds()`, or a `PlacementScore` of your own.
        probe_batches: number of batches that are read; three quarters are learned from, the rest judges.
        learning_rate: the common rate of all kinds of path in the probe's warm start.
        loss: `(model, batch) -> (examples,)`; default: `masking.scores.losses.task_losses`.
        heads: see `attach`.
        seed: of path weights, and of scores that draw random numbers.
        progress: show a progress bar on a terminal.

    Raises:
        AllocationError: an unknown score, no batches, a probe without gradient, scores that are not finite or name
            other units.
        BudgetError: the budget pays for no unit, or is larger than all candidates.
        AttachError, LayoutError, PathError, ConfigError: see `attach`.
    """
    placement = place(
        model,
        space,
        batches,
        score=score,
        probe_batches=probe_batches,
        learning_rate=learning_rate,
        loss=loss,
        heads=heads,
        seed=seed,
        progress=progress,
    )
    return placement.structure(budget)


def place(
    model: nn.Module,
    space: SearchSpace | str,
    batches: Batches | Mapping[str, Batches],
    *,
    score: str | PlacementScore = "moved",
    probe_batches: int = PROBE_BATCHES,
    learning_rate: float = 1e-2,
    loss: Loss | None = None,
    heads: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Placement:
    """Score every candidate unit; structures of any number of budgets follow from the result without another probe.

    The arguments and errors are those of `allocate`.
    """
    began = time.perf_counter()
    method = placement_score(score) if isinstance(score, str) else score
    check_no_adapters(model)
    space = SearchSpace.load(space) if isinstance(space, str) else space
    streams = dict(batches) if isinstance(batches, Mapping) else {DEFAULT_TASK: batches}
    read = {task: taken(stream, probe_batches) for task, stream in streams.items()}
    head_names = find_heads(model, heads)
    identity = backbone_fingerprint(model, skip=frozenset(head_names))
    sample = _sample(next(iter(read.values()))[0], model)
    layout = discover(model, sample)
    found, skipped_sites = candidates(space, layout)
    whole = gated_candidates(found, space, layout, tasks=tuple(streams), identity=identity, seed=seed)
    whole.skipped_sites = skipped_sites
    small = space.model_copy(update={"paths": tuple(_smallest(options) for options in space.paths)})
    rows: list[dict[str, Tensor]] = []
    for number, stream in enumerate(read.values()):
        with restored(model, head_names):
            adapters = attach(model, small, sample, heads=head_names or None, seed=seed)
            try:
                gates = adapters.bank
                assert gates is not None
                gates.fix(torch.ones_like(gates.kept))
                small_paths = dict(adapters.typed_paths())
                ranks = {key: path.units // small_paths[key].units for key, path in whole.typed_paths()}
                probe = Probe(
                    model,
                    adapters,
                    stream,
                    loss=loss or task_losses,
                    learning_rate=learning_rate,
                    seed=seed + number,
                    ranks=ranks,
                    progress=progress,
                )
                if number == 0:
                    choose_elements(whole, probe)
                stand_alike(adapters, whole)
                worth = method.worth(probe)
            finally:
                detach(model)
        rows.append(_checked(worth, dict(whole.typed_paths()), method))
    return Placement(method.kind, stack(rows), whole, time.perf_counter() - began)


def choose_elements(whole: Adapters, probe: Probe) -> None:
    """Let paths of the kind `elements` stand where `|mean_b g_b · w|` is largest; costs one pass of gradients.

    Several tasks share the elements that the first chooses. Where a weight cannot be read (quantised), paths stay
    where they are.
    """
    weights = {
        f"{path.site.write.module}.weight": probe.weight_of(path)
        for _, path in whole.typed_paths()
        if isinstance(path, Elements)
    }
    readable = {name: weight for name, weight in weights.items() if weight is not None}
    if not weights or len(readable) < len(weights):
        return
    totals = {name: torch.zeros_like(w, dtype=torch.float32, requires_grad=False) for name, w in readable.items()}
    probe.gradients(readable, lambda name, grad: totals[name].add_(grad.float()))
    for name, total in totals.items():
        total.mul_(readable[name].detach().float()).abs_()
    whole.choose_elements(totals)


def stand_alike(adapters: Adapters, whole: Adapters) -> None:
    """Let the elements of a probe's paths be the first of the whole candidates'."""
    for key, path in adapters.typed_paths():
        if isinstance(path, Elements):
            path.choose(cast(Elements, whole.paths[key]).positions[: len(path.values)])


def _smallest(options: PathOptions) -> PathOptions:
    return options.resized(1) if options.size > 1 else options


def _sample(batch: Batch, model: nn.Module) -> dict[str, Tensor] | None:
    """One example of a batch, without labels, to discover the layout with."""
    home = next(model.parameters()).device
    own = {
        key: value[:1].to(home)
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.dim() > 0 and key not in ("labels", "label", "label_ids")
    }
    return own or None


def _checked(worth: Mapping[str, Tensor], paths: Mapping[str, Path], method: PlacementScore) -> dict[str, Tensor]:
    """The worths of one task over all units of the candidates.

    Raises:
        AllocationError: they are of other candidates, not finite, or say that nothing is useful.
    """
    if worth.keys() != paths.keys():
        odd = sorted(worth.keys() ^ paths.keys())
        raise AllocationError(
            "the score judged other candidates",
            expected=f"the {len(paths)} candidates of the probe",
            got=f"{len(worth)}; they differ in {', '.join(odd[:3])}",
            where=f"allocate(score={method.kind!r})",
            fix="return a value for each key of probe.paths",
        )
    found = {}
    for key, values in worth.items():
        units = paths[key].units
        if values.dim() != 1 or not len(values) or units % len(values):
            raise AllocationError(
                "the score judged other units",
                expected=f"(n,) with n a divisor of {units}",
                got=f"shape {tuple(values.shape)}",
                where=f"allocate(score={method.kind!r}), path {key}",
                fix="return one value for the path, or one for each of its units",
            )
        if not bool(torch.isfinite(values).all()):
            raise AllocationError(
                "the score is not finite",
                expected="finite worths",
                got=f"{values[~torch.isfinite(values)][0].item()}",
                where=f"allocate(score={method.kind!r}), path {key}",
                fix="probe in fp32 or bf16, with a lower learning_rate or without broken examples",
            )
        found[key] = spread_over_units(values, units)
    if all(float(values.max()) <= 0 for values in found.values()):
        raise AllocationError(
            "no candidate is worth anything by this score",
            expected="at least one worth above 0",
            got="none",
            where=f"allocate(score={method.kind!r})",
            fix="pass more batches, or another score",
        )
    return found
