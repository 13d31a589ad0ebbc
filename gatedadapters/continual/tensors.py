"""What each parameter tensor of a backbone is for and how deep it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from gatedadapters.backbone import discover
from gatedadapters.backbone.fingerprint import is_own
from gatedadapters.errors import LayoutError
from gatedadapters.masking.roles import roles_in


@dataclass(frozen=True)
class TensorInfo:
    """One parameter tensor.

    Attributes:
        shape: of it.
        role: see `masking.roles`.
        block: index of the repeated block it is in, None outside of all.
        place: its name with the block's index left out, which is equal for equal tensors of all blocks.
        blocks: how many blocks there are.
    """

    shape: tuple[int, ...]
    role: str
    block: int | None
    place: str
    blocks: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def depth(self) -> float | None:
        """Relative depth of its block's middle, in (0, 1)."""
        return None if self.block is None else (self.block + 0.5) / self.blocks


def tensors_of(
    model: nn.Module, heads: frozenset[str] = frozenset(), sample: Mapping[str, Tensor] | None = None
) -> dict[str, TensorInfo]:
    """Every floating-point parameter of the backbone by name: heads and adapters do not count, tied ones count once.

    A model without a stack of blocks has tensors outside of blocks only.
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
        block, place = None, name
        for prefix, index in blocks:
            if name.startswith(f"{prefix}."):
                stem = prefix.rpartition(".")[0]
                block, place = index, f"{stem}.*{name[len(prefix) :]}"
        found[name] = TensorInfo(tuple(parameter.shape), roles[name], block, place, len(blocks))
    return found
