"""Which kinds of path one peft adapter can hold together."""

from __future__ import annotations

from collections.abc import Collection

from gatedadapters.paths.base import Path
from gatedadapters.paths.lora import LoRA
from gatedadapters.paths.norm import Norm
from gatedadapters.paths.rows import Rows
from gatedadapters.paths.scale import Scale
from gatedadapters.paths.weight_lora import WeightLoRA

# What one peft adapter can be of, and what it can hold beside.
TOGETHER: tuple[tuple[set[type[Path]], set[type[Path]]], ...] = (
    ({LoRA, WeightLoRA}, {Norm, Rows}),
    ({Scale}, {Norm}),
    ({Norm}, set()),
    ({Rows}, set()),
)


def peft_has(kinds: Collection[type[Path]]) -> bool:
    """Whether one peft adapter can be of paths of these kinds together."""
    found = set(kinds)
    return any(found <= one | beside and found & one for one, beside in TOGETHER)
