"""From scores to a mask: rank normalisation, contrast, exact top-k without sorting everything at once."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gatedadapters.errors import MaskError
from gatedadapters.masking.mask import Mask, check_backbone
from gatedadapters.masking.roles import chosen
from gatedadapters.masking.scores.storage import Scores, ScoresRecord, allocated, sharded

Scope = Literal["global", "tensor"]
IN_MEMORY_BYTES = 2**31
_HALF = 2**16


def select(
    general: Scores,
    domain: Scores | None = None,
    *,
    core: float | None = None,
    density: float | None = None,
    contrast: float = 1.0,
    scope: Scope = "global",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Mask:
    """Which elements are free: those that matter least for general ability, and most for the domain.

    Scores are rank-normalised in each tensor (average ranks, divided by the number of elements), combined to
    `s = Î_general - contrast Î_domain`, and the `core` share with the highest s stays fixed. The free elements are
    exactly `round((1 - core) n)` many; among equal s, those that come first in the model are free. The order of s is
    found by counting bit patterns, so that no sort is larger than one tensor.

    Args:
        general: scores on general data.
        domain: scores on the domain's data; None protects general ability alone, as does `contrast=0`.
        core: share of elements that stay fixed, in (0, 1); default 0.95. Give this or `density`.
        density: share that is free, `1 - core`.
        contrast: λ; 0 protects general ability only.
        scope: `global`: the share holds over all tensors; `tensor`: in each.
        include: roles or names (with * and ?) to select from; default: everything scored.
        exclude: of these, which to leave fixed as a whole. What is left out counts neither as core nor as free.

    Raises:
        MaskError: a share outside (0, 1), scores of different backbones or of all zeros, a pattern that matches
            nothing.

    References:
        arXiv 2604.17051 names the aim (general against domain importance, core fixed, the rest tuned); the combination
        is our instantiation.
    """
    free = _free_share(core, density)
    if not math.isfinite(contrast) or contrast < 0:
        raise MaskError(expected="contrast of at least 0", got=contrast, where="select(contrast=)")
    if scope not in ("global", "tensor"):
        raise MaskError(expected="global or tensor", got=repr(scope), where="select(scope=)")
    if domain is not None:
        check_backbone(domain.identity, general.identity, where="select: domain against general scores")
        missing = sorted(set(general.names) ^ set(domain.names))
        if missing:
            raise MaskError(
                "the two scores cover different parameters", expected="the same parameters in both", got=missing[0],
                where="select", fix="score with the same include= and exclude=",
            )  # fmt: skip
    names = chosen(general.roles, include, exclude, where="select")
    for scores in (general, domain):
        if scores is not None and not any(bool(scores[name].any()) for name in names):
            raise MaskError(
                "all scores are 0", expected="scores that tell elements apart", got="zeros", where=scores.kind,
                fix="check the data they were made from",
            )  # fmt: skip
    with ExitStack() as stack:
        keys = _combined(general, domain if contrast else None, contrast, names, stack)
        if scope == "tensor":
            indices = {name: lowest({name: keys[name]}, round(free * keys[name].numel()))[name] for name in names}
        else:
            total = sum(key.numel() for key in keys.values())
            indices = lowest(keys, round(free * total))
    if not any(len(found) for found in indices.values()):
        raise MaskError(
            "the mask would select nothing", expected="at least one free element", got=f"a free share of {free:g}",
            where="select", fix="lower core=",
        )  # fmt: skip
    origin = {
        "general": general.kind, "domain": None if domain is None else domain.kind, "free": free, "contrast": contrast,
        "scope": scope, "include": None if include is None else list(include),
        "exclude": None if exclude is None else list(exclude),
    }  # fmt: skip
    shapes = {name: tuple(general[name].shape) for name in names}
    return Mask.from_indices(indices, shapes, identity=general.identity, roles=general.roles, origin=origin)


def normalised_ranks(values: Tensor) -> Tensor:
    """Average rank of each element among all, divided by their number: fp32 in (0, 1], of the same shape.

    Equal values have equal ranks, the mean of the places they take.
    """
    flat = values.reshape(-1)
    ordered, order = flat.sort(stable=True)
    _, counts = ordered.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    average = (ends.double() - (counts.double() - 1) / 2) / max(1, flat.numel())
    ranks = torch.empty_like(flat, dtype=torch.float32)
    ranks[order] = average.to(torch.float32).repeat_interleave(counts)
    return ranks.view(values.shape)


def _free_share(core: float | None, density: float | None) -> float:
    if core is not None and density is not None:
        raise MaskError(expected="core= or density=", got="both", where="select", fix="drop one")
    name, given = ("density", density) if density is not None else ("core", 0.95 if core is None else core)
    if not 0.0 < given < 1.0:
        raise MaskError(expected=f"{name} in (0, 1)", got=given, where=f"select({name}=)")
    return float(given) if name == "density" else 1.0 - float(given)


def _combined(
    general: Scores, domain: Scores | None, contrast: float, names: Sequence[str], stack: ExitStack
) -> dict[str, Tensor]:
    """S of every tensor, flat fp32; on disk where that is more than memory should hold."""
    shapes = {name: tuple(general[name].shape) for name in names}
    if 4 * sum(math.prod(shape) for shape in shapes.values()) > IN_MEMORY_BYTES:
        record = ScoresRecord(kind="contrast", fingerprint=general.identity, tensors=sharded(shapes, {}))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gatedadapters-")))
        held = stack.enter_context(allocated(record, folder))
    else:
        held = {name: torch.empty(shape, device=general[name].device) for name, shape in shapes.items()}
    for name, key in held.items():
        ranks = normalised_ranks(general[name])
        if domain is not None:
            ranks -= contrast * normalised_ranks(domain[name]).to(ranks.device)
        key.copy_(ranks)
    return {name: held[name].view(-1) for name in names}


def lowest(keys: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Positions of exactly `count` smallest keys over all tensors, sorted in each; of equal keys, the first.

    Two passes count how often each upper and then each lower half of the keys' bits occurs, which gives the largest
    selected key exactly; a third collects.
    """
    if count <= 0:
        return {name: torch.empty(0, dtype=torch.int64) for name in keys}
    upper, below = _bucket((_ordered(k) // _HALF for k in keys.values()), count)
    inside = (code[code // _HALF == upper] % _HALF for code in map(_ordered, keys.values()))
    lower, below_too = _bucket(inside, count - below)
    threshold, ties = upper * _HALF + lower, count - below - below_too
    found = {}
    for name, key in keys.items():
        code = _ordered(key)
        taken = code < threshold
        equal = (code == threshold).nonzero().flatten()[:ties]
        ties -= len(equal)
        taken[equal] = True
        found[name] = taken.nonzero().flatten().cpu()
    return found


def _ordered(values: Tensor) -> Tensor:
    """int64 in [0, 2^32) in the order of fp32 values: the bits, with negative numbers turned round."""
    bits = (values + 0.0).view(torch.int32).long()  # + 0.0: there is one zero
    return torch.where(bits < 0, 2**31 - 1 - (bits + 2**31), bits + 2**31)


def _bucket(codes: Iterator[Tensor], count: int) -> tuple[int, int]:
    """The bucket that holds the `count`-th smallest code, and how many lie in buckets before it."""
    histogram = torch.zeros(_HALF, dtype=torch.int64)
    for code in codes:
        histogram += torch.bincount(code, minlength=_HALF).cpu()
    reached = histogram.cumsum(0)
    bucket = int(torch.searchsorted(reached, count))
    return bucket, int(reached[bucket] - histogram[bucket])
