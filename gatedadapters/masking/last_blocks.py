"""Tuning the last blocks alone, the oldest way to spare a backbone: what masks are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from gatedadapters.backbone import discover
from gatedadapters.errors import MaskError
from gatedadapters.supernet.attach import find_heads


def train_last_blocks(
    model: nn.Module, count: int, *, heads: Sequence[str] | None = None, sample: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Let only the last `count` blocks of every stack be trained, and the task heads; freeze everything else.

    Args:
        model: any model with a layout. Only `requires_grad` of its parameters changes.
        count: blocks, from the output on. A block that several layers share counts once and is trained as a whole.
        heads: see `attach`.
        sample: see `discover`.

    Returns:
        Names of the parameters that are trained.

    Raises:
        LayoutError: the model has no stack of blocks.
        MaskError: fewer than one block, or more than a stack has. Nothing is changed then.
    """
    stacks: dict[str, list[str]] = {}
    for block in discover(model, sample).blocks:
        stacks.setdefault(block.stack, []).append(block.name)
    shortest = min(map(len, stacks.values()))
    if not 1 <= count <= shortest:
        raise MaskError(
            "there are not so many blocks", expected=f"1 to {shortest}", got=count, where="train_last_blocks(count=)"
        )
    last = tuple(f"{name}." for names in stacks.values() for name in names[-count:])
    head_names = find_heads(model, heads)
    trained = [name for name, _ in model.named_parameters() if name.startswith(last) or name in head_names]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return trained
