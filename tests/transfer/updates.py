"""Updates of a base."""

from __future__ import annotations

import copy

import torch
from torch import nn


def updated(model: nn.Module, *, by: float = 0.1) -> nn.Module:
    """The backbone of `model` after an update, without adapters."""
    new = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return new
