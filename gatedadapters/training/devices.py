"""Which device a configuration asks for."""

from __future__ import annotations

import torch

from gatedadapters.errors import ConfigError


def on_cpu(device: str) -> bool:
    """Whether a run takes the CPU: it was asked for, or `device` is "auto" and there is nothing faster.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(expected="a CUDA device", got="none", where="device: cuda", fix="use auto or cpu")
    return device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
