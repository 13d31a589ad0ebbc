"""Small to large: the core found on a small model, carried over to a larger model of the same family."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gatedadapters.continual.core import Core
from gatedadapters.continual.tensors import TensorInfo
from gatedadapters.errors import MaskError


def carry_core(core: Core, larger: Mapping[str, TensorInfo]) -> Core:
    """The core of a larger model: its tensors whose counterparts in the small model are core.

    The counterpart of a tensor has the same role and the same pattern (its name without the block's index), and lies at
    the nearest relative depth. The middle of block b of n lies at depth (b + ½) / n; of two equally near blocks the
    earlier counts. Outside of the blocks, tensors correspond by name. Whole tensors are core, or nothing of them.

    Args:
        core: a core of whole tensors.
        larger: the tensors of the larger model, see `tensors_of`.

    Raises:
        MaskError: the core has tensors of which only a part is selected, or no tensor of the larger model has a
            counterpart that is core.

    References:
        arXiv 2605.31025 carries selections from small to large models without saying how; the mapping is ours.
    """
    partial = [name for name, found in core.indices.items() if len(found) != core.infos[name].numel]
    if partial:
        raise MaskError(
            "only whole tensors can be carried to another model",
            expected="a core of granularity tensor",
            got=f"{len(partial)} tensors selected in part",
            where=partial[0],
            fix="select by tensor",
        )
    counterparts: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for name, info in core.infos.items():
        counterparts.setdefault((info.pattern, info.role), []).append((_depth(info), name))
    indices, matched = {}, 0
    for name, info in larger.items():
        offered = counterparts.get((info.pattern, info.role), [])
        if offered:
            matched += 1
            depth = _depth(info)
            nearest = min(offered, key=lambda found: (round(abs(found[0] - depth), 9), found[0]))[1]
            if nearest in core.indices:
                indices[name] = torch.arange(info.numel)
    if not matched or not indices:
        raise MaskError(
            "the two models have no selected tensor in common",
            expected="two sizes of one family",
            got=f"{matched} of {len(larger)} tensors with a counterpart",
            where="carry_core",
            fix="carry between models of one family",
        )
    return Core(indices, larger, f"{core.kind}, carried")


def _depth(info: TensorInfo) -> float:
    """Relative depth; outside of the blocks a number that is the same in every model."""
    return -1.0 if info.depth is None else info.depth
