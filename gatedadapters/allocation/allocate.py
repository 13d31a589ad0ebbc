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
from gatedadapters.structure.frontier import Frontier
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
from gatedadapters.supernet.frontier import measure

Batches = Iterable[Batch]
PROBE_BATCHES = 24
ELEMENT_BATCHES = 6  # from which the places of single weights are chosen
KEPT_SHARE = 1 / 16
FRONTIER_POINTS = 8


def allocate(
    model: nn.Module,
    space: SearchSpace | str,
    batches: Batches | Mapping[str, Batches],
    *,
    budget: Budget,
    score: str | PlacementScore = "gain",
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
        probe_batches: number of batches that are read; scores that judge candidates on held-out batches, and
            `Budget(within=)`, keep a quarter of them for that.
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
        budget=None if budget.within is not None else budget,
        frontier=FRONTIER_POINTS if budget.within is not None else 0,
        within=budget.within,
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
    budget: Budget | None = None,
    frontier: int = 0,
    within: float | None = None,
    score: str | PlacementScore = "gain",
    probe_batches: int = PROBE_BATCHES,
    learning_rate: float = 1e-2,
    loss: Loss | None = None,
    heads: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Placement:
    """Score every candidate unit; structures of any number of budgets follow from the result without another probe.

    Args:
        model: see `allocate`, as for all other arguments and errors.
        space: see there.
        batches: see there.
        budget: about what will be kept, which decides how fast candidates learn in the warm start (see
            `Probe.warm_start`); default: a sixteenth of them.
        frontier: number of budgets at which to measure the held-out loss of the probe's candidates.
        within: look more closely at budgets that keep this share of the gain.
        score: see `allocate`.
        probe_batches: see there.
        learning_rate: see there.
        loss: see there.
        heads: see there.
        seed: see there.
        progress: see there.
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
    if frontier == 0:  # the smallest candidates cost least, but say nothing of large budgets
        space = space.model_copy(update={"paths": tuple(_smallest(options) for options in space.paths)})
    rows, frontiers = [], []
    for number, stream in enumerate(read.values()):
        with restored(model, head_names, seed + number):
            adapters = attach(model, space, sample, heads=head_names or None, seed=seed)
            adapters.follows_ids = False  # task ids of a batch are those of the model's heads
            try:
                probe = Probe(
                    model,
                    adapters,
                    stream,
                    kept=_kept(budget, whole),
                    hold_out=method.holds_out or frontier > 0,
                    loss=loss or task_losses,
                    learning_rate=learning_rate,
                    seed=seed + number,
                    whole=whole,
                    progress=progress,
                )
                with probe.opened():
                    if number == 0:
                        choose_elements(whole, probe)
                    stand_alike(adapters, whole)
                    rows.append(_checked(method.worth(probe), dict(whole.typed_paths()), method))
                    _check_useful(rows[-1], method)
                    if frontier:
                        frontiers.append(_frontier(probe, method, rows[-1], frontier, within))
            finally:
                detach(model)
    seconds = time.perf_counter() - began
    return Placement(method.kind, stack(rows), whole, seconds, tuple(frontiers), method.returns)


def place_attached(
    model: nn.Module,
    adapters: Adapters,
    batches: Sequence[Batch],
    *,
    score: str | PlacementScore,
    learning_rate: float,
    loss: Loss,
    seed: int,
    progress: bool,
    budget: Budget | None,
    frontier: int,
    within: float | None,
) -> Placement:
    """Score candidates that are attached already; they and the heads keep what they have learnt, gates are not touched.

    Without a frontier, the first unit of each candidate is judged and learns, as in `place`. All tasks get the same
    worths, those of the mixed batches; none need be above 0. The arguments are those of `place`.
    """
    began = time.perf_counter()
    method = placement_score(score) if isinstance(score, str) else score
    with restored(model, (), seed):
        probe = Probe(
            model,
            adapters,
            batches,
            loss=loss,
            learning_rate=learning_rate,
            kept=_kept(budget, adapters),
            hold_out=method.holds_out or frontier > 0,
            first_units=frontier == 0,
            seed=seed,
            progress=progress,
        )
        with probe.opened():
            choose_elements(adapters, probe)
            worth = _checked(_of_judged(method.worth(probe), probe), probe.paths, method)
            found = (_frontier(probe, method, worth, frontier, within),) if frontier else ()
    each = {key: values.expand(len(adapters.tasks), -1) for key, values in worth.items()}
    return Placement(method.kind, each, adapters, time.perf_counter() - began, found, method.returns)


def _kept(budget: Budget | None, whole: Adapters) -> float:
    """Parameters that will be kept, about."""
    bank = whole.bank
    assert bank is not None
    dense = 1.0 if budget is None else bank.dense_cost(budget.unit)
    share = KEPT_SHARE if budget is None else budget.resolve(dense) / dense
    return share * bank.dense_cost()


def _of_judged(worth: Mapping[str, Tensor], probe: Probe) -> dict[str, Tensor]:
    """The worths of units that were open, where a score judged closed ones, too."""
    return {
        key: values[probe.judged[key]] if key in probe.judged and values.shape == probe.judged[key].shape else values
        for key, values in worth.items()
    }


def _frontier(
    probe: Probe, method: PlacementScore, worth: Mapping[str, Tensor], points: int, within: float | None
) -> Frontier:
    """The frontier of one task's worths on the candidates as the probe left them."""
    probe.warm_start()
    tasks = len(probe.adapters.tasks)
    worths = {key: values.expand(tasks, -1) for key, values in worth.items()}
    own = Placement(method.kind, worths, probe.adapters, returns=method.returns)
    return measure(
        probe.adapters,
        probe.bank,
        own.structure,
        lambda: float(probe.losses().mean()),
        points=points,
        within=within,
    )


def choose_elements(whole: Adapters, probe: Probe) -> None:
    """Let paths of the kind `elements` stand where `|mean_b g_b · w|` is largest; costs a few passes
    of gradients.

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
    with probe.adapters.disabled():  # they add nothing before they learn, and would cost a third of the time
        probe.gradients(readable, lambda name, grad: totals[name].add_(grad.float()), most=ELEMENT_BATCHES)
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
    return found


def _check_useful(worth: Mapping[str, Tensor], method: PlacementScore) -> None:
    if all(float(values.max()) <= 0 for values in worth.values()):
        raise AllocationError(
            "no candidate is worth anything by this score",
            expected="at least one worth above 0",
            got="none",
            where=f"allocate(score={method.kind!r})",
            fix="pass more batches, or another score",
        )
