"""Numbers wider than those a model computes in."""

from __future__ import annotations

from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """In float64; on the CPU where the tensor's device has no such numbers (Apple's)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
