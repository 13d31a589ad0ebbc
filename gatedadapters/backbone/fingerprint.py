"""Telling backbones apart without reading all of them."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import nn

from gatedadapters.backbone.quantized import is_quantized, parts
from gatedadapters.config.base import Config

_SAMPLES = 64
DELTA = "sparse_delta"
OWN_MODULES = ("gated_adapters", DELTA)
"""What the library registers in a model."""


class Fingerprint(Config):
    """What a backbone is: digests of its parameters' names and shapes, and of a sample of their values.

    `heads` names the parameters left out of them: task heads, which are trained and saved with the adapters.
    """

    model_class: str
    shapes: str
    values: str
    heads: tuple[str, ...] = ()


def is_own(name: str) -> bool:
    """Whether a parameter belongs to something that the library registered in the model."""
    return any(part in OWN_MODULES for part in name.split("."))


def fingerprint(model: nn.Module, *, skip: frozenset[str] = frozenset()) -> Fingerprint:
    """Digest names, shapes and 64 evenly spaced values of every parameter except `skip` and our own.

    Values are rounded to bfloat16 first, so that loading a float32 checkpoint in bfloat16 changes nothing. In float16
    it may: rounding twice can give another value, and what is small is lost. Costs milliseconds and reads a negligible
    share of a large model.
    """
    shapes, values = hashlib.sha256(), hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if name in skip or is_own(name):
            continue
        shapes.update(f"{name}:{tuple(parameter.shape)};".encode())
        for part in parts(parameter.detach()):
            if part.device.type == "meta" or not (part.is_floating_point() or is_quantized(parameter)):
                continue
            flat = part.reshape(-1)
            picked = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to("cpu", torch.bfloat16)
            values.update(picked.view(torch.int16).numpy().tobytes())
    return Fingerprint(
        model_class=type(model).__name__,
        shapes=shapes.hexdigest()[:32],
        values=values.hexdigest()[:32],
        heads=tuple(sorted(skip)),
    )


def backbone_fingerprint(model: nn.Module, *, skip: frozenset[str] = frozenset()) -> Fingerprint:
    """`fingerprint` without what a sparse delta in the model has learned."""
    with ExitStack() as stack:
        for module in model.modules():
            delta = module._modules.get(DELTA)
            if delta is not None:
                stack.enter_context(cast(Any, delta).disabled())
        return fingerprint(model, skip=skip)
