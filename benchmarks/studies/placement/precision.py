"""The precision that this machine is fastest in."""

from __future__ import annotations

import functools

import torch

from benchmarks.common.store import SCRATCH, locked, write_whole
from benchmarks.common.timing import in_turns, medians


@functools.cache
def precision() -> str:
    """`bf16` where this machine multiplies matrices faster in it, else `fp32`; measured once and kept, so that all
    processes compute alike.
    """
    file = SCRATCH / "placement" / "precision.txt"
    with locked(file.with_suffix(".lock")):
        if not file.exists():
            sides = {
                name: functools.partial(torch.matmul, torch.rand(512, 576).to(dtype), torch.rand(576, 1536).to(dtype))
                for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
            }
            seconds = medians(in_turns(sides, 30, warm_up=5)["cpu"])
            write_whole(file, "bf16" if seconds["bf16"] < 0.8 * seconds["fp32"] else "fp32")
        return file.read_text(encoding="utf-8")


def autocast() -> torch.autocast:
    """A context that computes in that precision."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision() == "bf16")
