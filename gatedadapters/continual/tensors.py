"""What each parameter tensor of a backbone is for, and how deep it lies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from gatedadapters.backbone import discover
from gatedadapters.backbone.fingerprint import is_own
from gatedadapters.errors import LayoutError
from gatedadapters.masking.roles import roles_in


@dataclass(frozen=True)
class TensorInfo:
    """One parameter tensor of a backbone.

    Attributes:
        shape: shape of the tensor.
        role: what it is for, such as `q`, `up`, `bias` or `norm`; see `gatedadapters.masking.roles`.
        block: index of the repeated block that it is part of; None outside of all blocks.
        pattern: its name with `*` in place of the block's index. Corresponding tensors of all blocks have one pattern.
        blocks: how many blocks the model has.
    """

    shape: tuple[int, ...]
    role: str
    block: int | None
    pattern: str
    blocks: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def depth(self) -> float | None:
        """Relative depth of the middle of its block, in (0, 1); None outside of all blocks."""
        return None if self.block is None else (self.block + 0.5) / self.blocks


def tensors_of(
    model: nn.Module, heads: frozenset[str] = frozenset(), sample: Mapping[str, Tensor] | None = None
) -> dict[str, TensorInfo]:
    """Every floating-point parameter tensor of the backbone by name, in the order of the model.

    Heads and adapters are not part of the backbone. Tied tensors are listed once. A model without a stack of blocks has
    tensors outside of blocks only.

    Args:
        model: any module.
        heads: names of the parameters of all heads.
        sample: a batch to discover the layout with; default: one is made for token models.
    """
    try:
        layout = discover(model, sample)
    except LayoutError:
        layout = None
    roles = roles_in(model, layout)
    blocks = [] if layout is None else [(block.name, block.index) for block in layout.blocks]
    found = {}
    for name, parameter in model.named_parameters():
        if name in heads or is_own(name) or not parameter.is_floating_point():
            continue
        block, pattern = None, name
        for prefix, index in blocks:
            if name.startswith(f"{prefix}."):
                stack = prefix.rpartition(".")[0]
                block, pattern = index, f"{stack}.*{name[len(prefix) :]}"
        found[name] = TensorInfo(tuple(parameter.shape), roles[name], block, pattern, len(blocks))
    return found
