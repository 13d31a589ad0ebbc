"""Fingerprints, which tell backbones apart without reading all their values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import nn

from gatedadapters.backbone.quantized import is_quantized, parts
from gatedadapters.config.base import Config
from gatedadapters.runtime.sharding import class_name, plain_name, reshard, whole

_SAMPLES = 64
DELTA = "sparse_delta"
OWN_MODULES = ("gated_adapters", DELTA)
"""Names of the submodules that the library registers in a model."""


class Fingerprint(Config):
    """The identity of a backbone.

    Attributes:
        model_class: name of the model's class.
        shapes: digest of the names and shapes of its parameters.
        values: digest of a sample of their values.
        heads: parameters left out of both digests: task heads, which are trained and saved with the adapters.
    """

    model_class: str
    shapes: str
    values: str
    heads: tuple[str, ...] = ()


def is_own(name: str) -> bool:
    """Whether a parameter, by its name, belongs to the library and not to the backbone."""
    return any(part in OWN_MODULES for part in name.split("."))


def backbone_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` without what the library registered in the model, which may be a hundred adapters."""
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        for child_name, child in reversed(module._modules.items()):
            if child is not None and child_name not in OWN_MODULES:
                waiting.append((f"{name}.{child_name}" if name else child_name, child))


def backbone_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`named_parameters`, likewise."""
    seen: set[nn.Parameter] = set()
    for name, module in backbone_modules(model):
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield f"{name}.{leaf}" if name else leaf, parameter


def fingerprint(model: nn.Module, *, skip: frozenset[str] = frozenset()) -> Fingerprint:
    """Digest names, shapes and 64 evenly spaced values of every parameter, except `skip` and the library's own.

    Values are rounded to bfloat16 first, so a float32 checkpoint loaded in bfloat16 keeps its fingerprint. Loaded in
    float16 it may get another: small values become 0, and rounding twice can give another value. It takes milliseconds,
    because it reads a tiny share of a large model. Sharded weights are gathered one after the other, so all processes
    have to call this together.
    """
    reshard(model)
    shapes, values = hashlib.sha256(), hashlib.sha256()
    named = {plain_name(name): parameter for name, parameter in backbone_parameters(model)}
    for name, parameter in sorted(named.items()):
        if name in skip:
            continue
        shapes.update(f"{name}:{tuple(parameter.shape)};".encode())
        for part in parts(whole(parameter.detach())):
            if part.device.type == "meta" or not (part.is_floating_point() or is_quantized(parameter)):
                continue
            flat = part.reshape(-1)
            picked = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to("cpu", torch.bfloat16)
            values.update(picked.view(torch.int16).numpy().tobytes())
    return Fingerprint(
        model_class=class_name(model),
        shapes=shapes.hexdigest()[:32],
        values=values.hexdigest()[:32],
        heads=tuple(sorted(skip)),
    )


def backbone_fingerprint(model: nn.Module, *, skip: frozenset[str] = frozenset()) -> Fingerprint:
    """The `fingerprint` of the model with the original values of all elements that a sparse delta tunes."""
    with ExitStack() as stack:
        for _, module in backbone_modules(model):
            delta = module._modules.get(DELTA)
            if delta is not None:
                stack.enter_context(cast(Any, delta).disabled())
        return fingerprint(model, skip=skip)
