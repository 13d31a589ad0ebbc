"""From scores to a mask: rank normalisation, contrast, and an exact choice without sorting everything at once."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from gatedadapters.errors import MaskError
from gatedadapters.masking.keeping import TuningTrial, mask_that_keeps
from gatedadapters.masking.mask import Mask, check_backbone
from gatedadapters.masking.roles import matching_parameters
from gatedadapters.masking.scores.storage import Scores

Scope = Literal["global", "tensor"]
IN_MEMORY_BYTES = 2**31
_DIGITS = 2**16


def select(
    general: Scores,
    domain: Scores | None = None,
    *,
    protect: float | None = None,
    density: float | None = None,
    keep_general: float | None = None,
    trial: TuningTrial | None = None,
    contrast: float = 1.0,
    scope: Scope = "global",
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    core: float | None = None,
) -> Mask:
    """Select the elements that may be tuned: those that matter least for general ability and most for the domain.

    In each tensor, scores become average ranks divided by the number of elements, Î. Elements are ordered by
    `s = Î_general - contrast Î_domain`. The `protect` share with the highest s stays frozen, and the others are free:
    exactly `round((1 - protect) n)` of n elements. Among equal s, the elements that come first in the model are free.

    Memory: s takes 8 bytes an element, in float64, so that ranks differ in a tensor of any size. Above 2 GiB it lies in
    a temporary file. Ranking takes about 50 bytes for each element of one tensor at a time. The choice counts bit
    patterns of s instead of sorting all of them.

    Args:
        general: scores on general data.
        domain: scores on the domain's data. None protects general ability alone, as does `contrast=0`.
        protect: share of elements that stay frozen, in (0, 1); default 0.95. Give this or `density`.
        density: share of elements that are free, `1 - protect`.
        keep_general: in place of a share, the most that the loss on general text may rise, as a share of it: 0.01 is
            one percent. The share that keeps to it is searched by short tries of the tuning to come; what they showed
            is in the mask's `origin`. The model is left as it was.
        trial: how to try, and the held-out general text to measure on; needed with `keep_general`.
        contrast: λ, the weight of the domain's scores, at least 0.
        scope: `global` takes the share over all tensors together, `tensor` in each tensor.
        include: roles or names (with * and ?) to select from; default: everything scored.
        exclude: which of these to freeze as a whole. Their elements count neither as protected nor as free.
        core: deprecated name of `protect`.

    Raises:
        MaskError: a share is outside (0, 1), scores belong to different backbones or are all 0, a pattern matches
            nothing, no element would be free, there is no held-out general text for `keep_general`, or no share keeps
            to it.

    References:
        arXiv 2604.17051 names the aim: weigh importance in general against importance for the domain, freeze what
        matters in general, tune the rest. The formula is ours.
    """
    if core is not None:
        if protect is not None:
            raise MaskError(
                expected="protect=", got="protect= and core=, its old name", where="select", fix="drop core"
            )
        warnings.warn("select(core=) is now called select(protect=)", DeprecationWarning, stacklevel=2)
        protect = core
    if keep_general is not None and (protect is not None or density is not None):
        raise MaskError(
            "the protected share is found from keep_general",
            expected="keep_general= alone",
            got="protect= or density= beside it",
            where="select",
            fix="drop one of them",
        )
    free = _free_share(protect, density)
    if not math.isfinite(contrast) or contrast < 0:
        raise MaskError(
            expected="contrast of at least 0", got=contrast, where="select(contrast=)", fix="give such a value"
        )
    if scope not in ("global", "tensor"):
        raise MaskError(expected="global or tensor", got=repr(scope), where="select(scope=)", fix="give such a value")
    if domain is not None:
        check_backbone(domain.identity, general.identity, where="select: domain against general scores")
        missing = sorted(set(general.names) ^ set(domain.names))
        if missing:
            raise MaskError(
                "the two scores cover different parameters",
                expected="the same parameters in both",
                got=missing[0],
                where="select",
                fix="score with the same include= and exclude=",
            )
    names = matching_parameters(general.roles, include, exclude, where="select")
    for scores in (general, domain):
        if scores is not None and not any(bool(scores[name].any()) for name in names):
            raise MaskError(
                "all scores are 0",
                expected="scores that tell elements apart",
                got="zeros",
                where=scores.kind,
                fix="check the data they were made from",
            )
    origin = {
        "general": general.kind,
        "domain": None if domain is None else domain.kind,
        "contrast": contrast,
        "scope": scope,
        "include": None if include is None else list(include),
        "exclude": None if exclude is None else list(exclude),
    }
    shapes = {name: tuple(general[name].shape) for name in names}
    with ExitStack() as stack:
        keys = _combined(general, domain if contrast else None, contrast, names, stack)

        def of_share(free: float) -> Mask:
            if scope == "tensor":
                indices = {name: lowest({name: key}, round(free * key.numel()))[name] for name, key in keys.items()}
            else:
                indices = lowest(keys, round(free * sum(key.numel() for key in keys.values())))
            if not any(len(found) for found in indices.values()):
                raise MaskError(
                    "the mask would select nothing",
                    expected="at least one free element",
                    got=f"a free share of {free:g}",
                    where="select",
                    fix="lower protect= or raise density=",
                )
            told = {**origin, "free": free}
            return Mask.from_indices(indices, shapes, identity=general.identity, roles=general.roles, origin=told)

        return of_share(free) if keep_general is None else mask_that_keeps(keep_general, trial, of_share)


def normalised_ranks(values: Tensor) -> Tensor:
    """The rank of each element divided by the number of elements: float64 in (0, 1], of the same shape.

    Equal values get equal ranks, the mean of their positions. (fp32 would not distinguish more than 2^24 ranks.)
    """
    return _ranks(values).div_(max(1, values.numel()))


def _ranks(values: Tensor) -> Tensor:
    """Average ranks, starting at 1. They are multiples of a half, so float64 holds them exactly."""
    flat = values.reshape(-1)
    ordered, order = flat.sort(stable=True)
    _, counts = ordered.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0)
    average = ends.double() - (counts.double() - 1) / 2
    ranks = torch.empty_like(flat, dtype=torch.float64)
    ranks[order] = average.repeat_interleave(counts)
    return ranks.view(values.shape)


def _free_share(protect: float | None, density: float | None) -> float:
    if protect is not None and density is not None:
        raise MaskError(expected="protect= or density=", got="both", where="select", fix="drop one")
    name, given = ("density", density) if density is not None else ("protect", 0.95 if protect is None else protect)
    if not 0.0 < given < 1.0:
        raise MaskError(expected=f"{name} in (0, 1)", got=given, where=f"select({name}=)", fix="give such a value")
    return float(given) if name == "density" else 1.0 - float(given)


def _combined(
    general: Scores, domain: Scores | None, contrast: float, names: Sequence[str], stack: ExitStack
) -> dict[str, Tensor]:
    """The key s of every tensor as flat float64, in temporary files if it takes more than `IN_MEMORY_BYTES`.

    The division by the number of elements comes last. Differences of ranks are exact, so equal ones stay equal.
    """
    folder = None
    if 8 * sum(general[name].numel() for name in names) > IN_MEMORY_BYTES:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gatedadapters-")))
    keys = {}
    for number, name in enumerate(names):
        key = _ranks(general[name]).view(-1)
        if domain is not None:
            key.sub_(_ranks(domain[name]).view(-1).to(key.device), alpha=contrast)
        key.div_(max(1, key.numel()))
        if folder is not None and key.numel():
            file = str(folder / str(number))
            key = torch.from_file(file, shared=True, size=key.numel(), dtype=torch.float64).copy_(key)
        keys[name] = key
    return keys


def lowest(keys: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The positions of the `count` smallest keys over all tensors, sorted in each tensor; the first of equal keys.

    Four passes find the largest selected key, 16 bits at a time from the highest down: each pass counts how often these
    bits occur among the keys that share the bits found so far. A fifth pass collects the positions. Beside the keys,
    memory holds a few times 8 bytes for each element of one tensor.

    Args:
        keys: flat float64 by name.
        count: how many to select.
    """
    if count <= 0:
        return {name: torch.empty(0, dtype=torch.int64) for name in keys}
    first, ties = -_DIGITS // 2, count  # the smallest digits to count, and how many keys are selected from there on
    for shift in (48, 32, 16, 0):
        histogram = torch.zeros(_DIGITS, dtype=torch.int64)
        for key in keys.values():
            digits = (_ordered(key) >> shift).sub_(first)
            digits = digits[(digits >= 0) & (digits < _DIGITS)]
            histogram += torch.bincount(digits, minlength=_DIGITS).cpu()
        reached = histogram.cumsum(0)
        bucket = int(torch.searchsorted(reached, ties))
        ties -= int(reached[bucket] - histogram[bucket])
        first = (first + bucket) * _DIGITS
    threshold = first // _DIGITS
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
    """int64 in the order of the values: the bits of float64, inverted after the sign if the number is negative."""
    bits = (values.double() + 0.0).view(torch.int64)  # + 0.0 turns -0.0 into 0.0
    return torch.where(bits < 0, bits ^ (2**63 - 1), bits)
