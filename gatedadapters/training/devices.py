"""The device that a configuration asks for."""

from __future__ import annotations

import torch

from gatedadapters.errors import ConfigError


def chosen_device(device: str) -> torch.device:
    """The device that a run uses; see `on_cpu`."""
    if on_cpu(device):
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "mps")


def on_cpu(device: str) -> bool:
    """Whether a run uses the CPU: `device` is "cpu", or it is "auto" and there is no GPU.

    Raises:
        ConfigError: `device` is "cuda" and there is no CUDA device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "there is no GPU", expected="a CUDA device", got="none", where="device: cuda", fix="use auto or cpu"
        )
    return device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available())
