"""Tuning only the last blocks, a simple baseline for masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from gatedadapters.backbone import discover
from gatedadapters.errors import MaskError
from gatedadapters.supernet.attach import find_heads


def train_last_blocks(
    model: nn.Module, count: int, *, heads: Sequence[str] | None = None, sample: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Make only the last `count` blocks of every stack and the task heads trainable, and freeze everything else.

    Args:
        model: any model with a layout. Only `requires_grad` of its parameters changes.
        count: number of blocks, counted from the output. A block that several layers share counts once.
        heads: see `attach`.
        sample: see `discover`.

    Returns:
        Names of the trainable parameters.

    Raises:
        LayoutError: the model has no stack of blocks.
        MaskError: `count` is below 1 or above the number of blocks of a stack. Nothing is changed then.
    """
    stacks: dict[str, list[str]] = {}
    for block in discover(model, sample).blocks:
        stacks.setdefault(block.stack, []).append(block.name)
    shortest = min(map(len, stacks.values()))
    if not 1 <= count <= shortest:
        raise MaskError(
            "there are not so many blocks",
            expected=f"1 to {shortest}",
            got=count,
            where="train_last_blocks(count=)",
            fix="give a number in this range",
        )
    last = tuple(f"{name}." for names in stacks.values() for name in names[-count:])
    head_names = find_heads(model, heads)
    trained = [name for name, _ in model.named_parameters() if name.startswith(last) or name in head_names]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return trained
