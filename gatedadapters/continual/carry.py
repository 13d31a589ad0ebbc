"""Small to large: a core found on a small model, carried to a larger one of the family."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gatedadapters.continual.core import Core
from gatedadapters.continual.tensors import TensorInfo
from gatedadapters.errors import MaskError


def carry_core(core: Core, larger: Mapping[str, TensorInfo]) -> Core:
    """The core of a larger model whose tensors have the role, place and relative depth of those in `core`.

    A block at relative depth x (the middle of block b of n is at (b + ½) / n) takes its selection from the small
    model's block nearest to x, the earlier of two equally near. Tensors outside the blocks go by their names. A tensor
    is core as a whole where its counterpart is.

    Args:
        core: of whole tensors.
        larger: the other model's tensors, see `tensors_of`.

    Raises:
        MaskError: a core of single elements, or no tensor of the other model has a counterpart.

    References:
        arXiv 2605.31025 carries selections from small to large models without saying how; the mapping is ours.
    """
    partial = [name for name, found in core.indices.items() if len(found) != core.infos[name].numel]
    if partial:
        raise MaskError(
            "only whole tensors are carried to another model",
            expected="a core of granularity tensor",
            got=f"{len(partial)} tensors selected in part",
            where=partial[0],
            fix="select by tensor",
        )
    counterparts: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for name, info in core.infos.items():
        depth = -1.0 if info.depth is None else info.depth
        counterparts.setdefault((info.place, info.role), []).append((depth, name))
    indices, matched = {}, 0
    for name, info in larger.items():
        offered = counterparts.get((info.place, info.role), [])
        if offered:
            matched += 1
            depth = -1.0 if info.depth is None else info.depth
            nearest = min(offered, key=lambda place: (round(abs(place[0] - depth), 9), place[0]))[1]
            if nearest in core.indices:
                indices[name] = torch.arange(info.numel)
    if not matched or not indices:
        raise MaskError(
            "the two models have no selected place in common",
            expected="two sizes of one family",
            got=f"{matched} of {len(larger)} tensors with a counterpart",
            where="carry_core",
            fix="carry between models of one family",
        )
    return Core(indices, larger, f"{core.kind}, carried")
