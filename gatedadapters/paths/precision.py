"""Double precision for linear algebra on parameters."""

from __future__ import annotations

from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU if it is on an Apple GPU, which has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
