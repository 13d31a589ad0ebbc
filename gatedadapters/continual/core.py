"""The core of a task: the elements that may move while the task is tuned. How it is selected, stored and shown."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
from pydantic import NonNegativeInt
from torch import Tensor, nn

from gatedadapters.artefact_files import own_digest, with_digests
from gatedadapters.backbone.fingerprint import Fingerprint
from gatedadapters.config.base import Config, read_record
from gatedadapters.continual.probing import Probe
from gatedadapters.continual.tensors import TensorInfo
from gatedadapters.errors import ArtifactError, MaskError
from gatedadapters.masking import Mask
from gatedadapters.masking.selection import lowest
from gatedadapters.reporting.tables import format_table

CORE = "core.json"
CoreKind = Literal["l2_fisher", "cosine", "delta"]
"""The quantity that a core is selected by; see `select_core`."""

Positions = Mapping[str, Tensor]
"""By tensor, the flat positions of its selected elements: (selected,) int64, sorted."""


@dataclass(frozen=True)
class Core:
    """The elements of the backbone that a task may move. Heads are not part of the backbone.

    Attributes:
        indices: the selected elements by tensor; tensors without any are left out.
        infos: every tensor of the backbone, also those that could not be chosen. Shares count all of them.
        kind: how the core was selected.
        scores: the score of each tensor that could be chosen, where whole tensors were ranked; else empty.
    """

    indices: Positions
    infos: Mapping[str, TensorInfo]
    kind: str
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """How many elements are selected."""
        return sum(map(len, self.indices.values()))

    @property
    def element_share(self) -> float:
        """Selected elements over all elements of the backbone, in [0, 1]."""
        return self.elements / sum(info.numel for info in self.infos.values())

    @property
    def tensor_share(self) -> float:
        """Tensors with a selected element over all tensors of the backbone, in [0, 1]."""
        return len(self.indices) / len(self.infos)

    def mask(self, model: nn.Module, heads: frozenset[str]) -> Mask:
        """The core as a mask of `model`, made for the weights that the model has now.

        Args:
            model: the model whose backbone the core was selected from.
            heads: names of the parameters of all heads.
        """
        return Mask.build(model, self.indices, heads=heads)

    def cells(self) -> dict[tuple[int | None, str], tuple[int, int, int, int]]:
        """By block (None: outside of all blocks) and role four counts: tensors with a selected element, all tensors,
        selected elements, all elements.
        """
        found: dict[tuple[int | None, str], tuple[int, int, int, int]] = {}
        for name, info in self.infos.items():
            chosen = len(self.indices.get(name, ()))
            old = found.get((info.block, info.role), (0, 0, 0, 0))
            new = (int(chosen > 0), 1, chosen, info.numel)
            found[info.block, info.role] = (old[0] + new[0], old[1] + new[1], old[2] + new[2], old[3] + new[3])
        return found

    def table(self) -> str:
        """Selected tensors and elements by role, then by block."""
        title = (
            f"{self.kind}: {len(self.indices)} of {len(self.infos)} tensors ({self.tensor_share:.1%}), "
            f"{self.elements:,} elements ({self.element_share:.3%}), heads not counted"
        )
        parts = [title]
        for column, label in ((1, "role"), (0, "block")):
            sums: dict[str, tuple[int, ...]] = {}
            for cell, counts in self.cells().items():
                key = "outside" if cell[column] is None else str(cell[column])
                sums[key] = tuple(a + b for a, b in zip(sums.get(key, (0,) * 4), counts, strict=True))
            rows = [[key, f"{c[0]}/{c[1]}", f"{c[2]:,}", f"{c[2] / c[3]:.2%}"] for key, c in sums.items()]
            parts.append(format_table([label, "tensors", "elements", "of its elements"], rows))
        return "\n".join(parts)

    def __str__(self) -> str:
        return self.table()

    def overlap(self, other: Core) -> float:
        """Elements that both cores select over elements that at least one of them selects (Jaccard index)."""
        both = sum(
            int(torch.isin(self.indices[name], other.indices[name]).sum())
            for name in self.indices.keys() & other.indices.keys()
        )
        return both / max(1, self.elements + other.elements - both)


def select_core(
    infos: Mapping[str, TensorInfo],
    probes: Sequence[Probe],
    index: int,
    *,
    kind: CoreKind = "l2_fisher",
    share: float = 0.1,
    granularity: Literal["tensor", "element"] = "tensor",
    previous: Sequence[Core] = (),
    candidates: Collection[str] | None = None,
) -> Core:
    """Select the core of one task from probes.

    A probe (see `probe`) gives for each tensor p, which has N_p elements, the update Δ[p] of a short training and the
    mean squared gradient F_p at its end. A hat (d̂, F̂) marks values that are min-max normalised over all tensors.

    By tensor, the core is `⌊share n⌋` (at least one) of the n tensors that may be chosen:

    - `l2_fisher`: the largest `S = ½ d̂ + ½ F̂`, with `d_p = ‖Δ[p]‖₂ / √N_p`.
    - `cosine`: the smallest mean over all other tasks u of `cos(Δ[p], Δ_u[p])`. Tensors that the task did not move
      (layers that it does not use) come last.
    - `delta`: the largest d_p.

    By element, the core is exactly `round(share N)` (at least one) of the N elements that may be chosen, by the same
    quantities of single elements:

    - `l2_fisher`: the largest `½ |Δ_i| + ½ F_i`, both min-max normalised over all elements.
    - `cosine`: the smallest mean over u of `N_p Δ_i Δ_u,i / (‖Δ[p]‖ ‖Δ_u[p]‖)`. Its mean over a tensor is the tensor's
      cosine. This form is ours.
    - `delta`: the largest |Δ_i|, as in LoTA.

    Of equal values those that come first in the model are chosen.

    Args:
        infos: every tensor of the backbone, see `tensors_of`.
        probes: of all tasks, for `cosine`; of the other kinds only `probes[index]` is read.
        index: which of the probes is the task's.
        kind: the quantity.
        share: of the tensors or elements that may be chosen, in (0, 1).
        granularity: choose whole tensors, or single elements.
        previous: cores of earlier tasks; nothing of them is chosen again.
        candidates: names of the tensors that may be chosen; default: all.

    Raises:
        MaskError: cosine with one task, or nothing is left to choose.

    References:
        arXiv 2605.31025, released code; Panda et al. 2024, "Lottery Ticket Adaptation", arXiv 2406.16797 (|Δ|).
    """
    if kind == "cosine" and len(probes) < 2:
        raise MaskError(
            "cosine compares the updates of tasks",
            expected="probes of two tasks or more",
            got=len(probes),
            where="select_core",
            fix="use l2_fisher for a single task",
        )
    every, infos = infos, _restricted(infos, candidates)
    if granularity == "tensor":
        used = {name for core in previous for name in core.indices}
        scores = _tensor_scores(infos, probes, index, kind)
        left = [name for name in infos if name not in used]
        count = min(len(left), share_of_tensors(share, len(infos)))
        best = set(sorted(left, key=lambda name: -scores[name])[:count])  # stable: ties go to what comes first
        indices = {name: torch.arange(infos[name].numel) for name in infos if name in best}
    else:
        scores = {}
        keys = _element_keys(infos, probes, index, kind)
        total = sum(info.numel for info in infos.values())
        taken = 0
        for name in infos:
            used_here = _used(name, previous)
            keys[name][used_here] = math.inf
            taken += len(used_here)
        indices = lowest(keys, min(max(1, round(share * total)), total - taken))
        indices = {name: found for name, found in indices.items() if len(found)}
    if not indices:
        raise MaskError(
            "nothing is left for this task's core",
            expected="parameters that no earlier task has chosen",
            got=f"{len(previous)} earlier tasks have all",
            where="select_core",
            fix="lower share=, or overlap='allow'",
        )
    return Core(indices, every, kind, scores)


def share_of_tensors(share: float, count: int) -> int:
    """How many of `count` tensors a share stands for: rounded down, as in the released code, and at least one."""
    return max(1, math.floor(share * count + 1e-9))


def random_core(
    infos: Mapping[str, TensorInfo],
    elements: int,
    *,
    granularity: Literal["tensor", "element"] = "tensor",
    seed: int,
    previous: Sequence[Core] = (),
    candidates: Collection[str] | None = None,
) -> Core:
    """Draw a core of exactly `elements` elements at random: the control that every selection needs.

    By tensor, whole tensors are taken in random order, and tensors that are too large for what is missing are passed
    over. What is missing in the end is taken from one more tensor, as a run of neighbouring elements. Where earlier
    tasks chose a part of a tensor, its other elements count as a whole tensor.

    Args:
        infos: every tensor of the backbone, see `tensors_of`.
        elements: how many elements.
        granularity: choose whole tensors, or single elements.
        seed: of the draw.
        previous: cores of earlier tasks; nothing of them is chosen again.
        candidates: names of the tensors that may be chosen; default: all.

    Raises:
        MaskError: fewer elements are left than are asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    allowed = _restricted(infos, candidates)
    used = {name: _used(name, previous) for name in allowed}
    free = {name: info.numel - len(used[name]) for name, info in allowed.items()}
    available = sum(free.values())
    if not 0 < elements <= available:
        raise MaskError(
            "there are not so many elements to choose from",
            expected=f"1..{available:,}",
            got=f"{elements:,}",
            where="random_core",
            fix="lower the number",
        )
    if granularity == "element":
        keys = {name: torch.rand(info.numel, generator=generator) for name, info in allowed.items()}
        for name, key in keys.items():
            key[used[name]] = math.inf
        return Core({n: found for n, found in lowest(keys, elements).items() if len(found)}, infos, "random")
    names, indices, missing = [name for name in allowed if free[name]], dict[str, Tensor](), elements
    order = [names[i] for i in torch.randperm(len(names), generator=generator).tolist()]
    for name in order:
        if free[name] <= missing:
            indices[name] = _free(allowed[name], used[name])
            missing -= free[name]
    rest = next((name for name in order if name not in indices), None)
    if missing and rest is not None:
        start = int(torch.randint(free[rest] - missing + 1, (1,), generator=generator))
        indices[rest] = _free(allowed[rest], used[rest])[start : start + missing]
    return Core({name: indices[name] for name in infos if name in indices}, infos, "random")


def save_core(core: Core, folder: Path, identity: Fingerprint) -> None:
    """Write a core into an existing folder: a mask, and beside it the scores and all tensors of the backbone.

    Args:
        core: the core.
        folder: an existing folder.
        identity: fingerprint of the backbone before the stream.
    """
    shapes = {name: info.shape for name, info in core.infos.items()}
    roles = {name: info.role for name, info in core.infos.items()}
    origin = {"kind": core.kind}
    tensors = {
        name: {
            "shape": info.shape,
            "role": info.role,
            "block": info.block,
            "place": info.pattern,  # as files of version 0.1 call it
            "blocks": info.blocks,
        }
        for name, info in core.infos.items()
    }
    data = {"scores": dict(core.scores), "tensors": tensors}
    text = with_digests(json.dumps(data))
    (folder / CORE).write_text(text, encoding="utf-8")
    mask = Mask.from_indices(core.indices, shapes, identity=identity, roles=roles, origin=origin)
    mask.write(folder, {CORE: own_digest(text)})


class TensorRecord(Config):
    """A `TensorInfo` as data; `place` is its pattern, as files of version 0.1 call it."""

    shape: tuple[NonNegativeInt, ...]
    role: str
    block: int | None
    place: str
    blocks: int


class CoreRecord(Config):
    """Scores and tensors of a core as data."""

    scores: dict[str, float]
    tensors: dict[str, TensorRecord]


def load_core(folder: Path, *, verify: bool = True) -> Core:
    """Read what `save_core` wrote.

    Args:
        folder: the folder.
        verify: check the digests of the files, which tell damage.

    Raises:
        ArtifactError: files are missing, damaged or of another kind.
    """
    mask, beside = Mask.read(folder, verify=verify)
    record, file = read_record(
        CoreRecord,
        folder / CORE,
        what="a stored core",
        expected=f"{CORE} beside a mask",
        fix="give the folder of a stream whose strategy selects cores",
        verify=verify,
        versions=None,
    )
    infos = {name: TensorInfo(t.shape, t.role, t.block, t.place, t.blocks) for name, t in record.tensors.items()}
    shapes = {name: info.shape for name, info in infos.items()}
    if shapes != {name: mask.shape(name) for name in mask.names} or beside.digest(CORE) not in (None, file.own):
        raise ArtifactError(
            "a core and the mask beside it do not belong together",
            expected=f"the {len(mask.names)} tensors of the mask",
            got=f"{len(infos)} tensors, other shapes or another digest",
            where=folder,
            fix="restore the folder as it was written",
        )
    indices = {name: mask.indices(name) for name in mask.names if mask.count(name)}
    return Core(indices, infos, str(mask.origin.get("kind", "core")), record.scores)


def min_max(values: Mapping[str, float]) -> dict[str, float]:
    """Min-max normalisation: values scaled to [0, 1]; all 0 if they are equal."""
    low, high = min(values.values()), max(values.values())
    return {name: (value - low) / (high - low) if high > low else 0.0 for name, value in values.items()}


def cosines(probes: Sequence[Probe], index: int, name: str) -> list[float]:
    """The cosines between one tensor's update under a task and its updates under all other tasks.

    A cosine is 0 where one of the two updates is 0.
    """
    own = probes[index].delta(name).double().flatten()
    found = []
    for other, probe in enumerate(probes):
        if other != index:
            update = probe.delta(name).double().flatten()
            norms = float(own.norm() * update.norm())
            found.append(float(own @ update) / norms if norms else 0.0)
    return found


def _used(name: str, earlier: Sequence[Core]) -> Tensor:
    """Positions of a tensor that are part of an earlier core, (used,) int64."""
    found = [core.indices[name] for core in earlier if name in core.indices]
    return torch.cat(found).unique() if found else torch.empty(0, dtype=torch.int64)


def _free(info: TensorInfo, used: Tensor) -> Tensor:
    """All positions of a tensor except the used ones, (free,) int64, sorted."""
    left = torch.ones(info.numel, dtype=torch.bool)
    left[used] = False
    return left.nonzero().flatten()


def _restricted(infos: Mapping[str, TensorInfo], names: Collection[str] | None) -> Mapping[str, TensorInfo]:
    """The tensors that may be chosen, in the order of the model."""
    allowed = set(infos if names is None else names)
    return {name: info for name, info in infos.items() if name in allowed}


def _tensor_scores(
    infos: Mapping[str, TensorInfo], probes: Sequence[Probe], index: int, kind: CoreKind
) -> dict[str, float]:
    """A score of each tensor; the largest are chosen."""
    record = probes[index].record
    density = {name: record.norms[name] / math.sqrt(info.numel) for name, info in infos.items()}
    if kind == "delta":
        return density
    if kind == "l2_fisher":
        d, F = min_max(density), min_max({name: record.fisher[name] for name in infos})
        return {name: 0.5 * d[name] + 0.5 * F[name] for name in infos}
    return {name: -mean(cosines(probes, index, name)) if record.norms[name] else -math.inf for name in infos}


def _element_keys(
    infos: Mapping[str, TensorInfo], probes: Sequence[Probe], index: int, kind: CoreKind
) -> dict[str, Tensor]:
    """A key of each element, by tensor (elements,) fp32; the smallest are chosen."""
    own = probes[index]
    if kind == "delta":
        return {name: -own.delta(name).abs().flatten() for name in infos}
    if kind == "cosine":
        return {name: _contributions(probes, index, name) for name in infos}
    fisher = own.squared_gradients()
    keys = {name: own.delta(name).abs().flatten() for name in infos}
    rescale_d = _min_max_over(lambda name: keys[name], infos)
    rescale_f = _min_max_over(lambda name: fisher[name].flatten(), infos)
    for name in infos:
        keys[name] = -(0.5 * rescale_d(keys[name]) + 0.5 * rescale_f(fisher[name].flatten()))
    return keys


def _contributions(probes: Sequence[Probe], index: int, name: str) -> Tensor:
    """What each element of a tensor contributes to its mean cosine with the other tasks, (elements,) fp32."""
    own = probes[index].delta(name).double().flatten()
    total = torch.zeros_like(own)
    for other, probe in enumerate(probes):
        if other != index:
            update = probe.delta(name).double().flatten()
            norms = float(own.norm() * update.norm())
            total += own * update * (len(own) / norms) if norms else 0.0
    last = torch.finfo(torch.float32).max  # chosen after all elements that moved; used ones have inf
    return torch.where(own != 0, total / (len(probes) - 1), last).float()


def _min_max_over(values: Callable[[str], Tensor], infos: Mapping[str, TensorInfo]) -> Callable[[Tensor], Tensor]:
    """A function that normalises a tensor by the minimum and maximum over all elements of all tensors."""
    low = min(float(values(name).min()) for name in infos)
    high = max(float(values(name).max()) for name in infos)
    return lambda t: (t - low) / (high - low) if high > low else torch.zeros_like(t)
