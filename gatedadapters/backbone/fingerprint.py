"""Fingerprints, which tell backbones apart without reading all their values."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, ClassVar, cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from gatedadapters.backbone.quantized import dequantized, full_shape, is_quantized, parts, unpack
from gatedadapters.config.base import Config
from gatedadapters.runtime.sharding import class_name, plain_name, reshard, whole

_SAMPLES = 64
_FEW = 16  # values of each matrix that are compared across quantisation
_ROUNDING, _ONE_MATRIX = 0.25, 0.6  # relative errors: 4 bits lose about .1 of all weights together, less than .4 of any
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
        exact: digest of what quantisers leave alone: vectors, and tables of token ids.
        samples: a few values of each other parameter, bfloat16 in base64; empty without values (meta device).
        quantized: whether a weight is quantised.
    """

    added: ClassVar[tuple[str, ...]] = ("exact", "samples", "quantized")

    model_class: str
    shapes: str
    values: str
    heads: tuple[str, ...] = ()
    exact: str = ""
    samples: str = Field("", repr=False)
    quantized: bool = False

    @field_validator("samples")
    @classmethod
    def _rows(cls, value: str) -> str:
        if len(base64.b64decode(value, validate=True)) % (2 * _FEW):
            raise ValueError(f"must hold {_FEW} values of each parameter")
        return value

    def is_quantization_of(self, other: Fingerprint) -> bool:
        """Whether one of two backbones may be a quantised form of the other, or both of a third.

        What quantisers leave alone has to be equal, and the samples of all other weights as close as 4 bits can tell.
        A backbone that was fine-tuned in the quantised weights alone, and by less than that, passes too.
        """
        if not (self.quantized or other.quantized) or not self.samples or not other.samples:
            return False
        alike = ("model_class", "shapes", "heads", "exact")
        if any(getattr(self, field) != getattr(other, field) for field in alike):
            return False
        mine, theirs = _read(self.samples), _read(other.samples)
        size = torch.minimum(mine.norm(dim=1), theirs.norm(dim=1))
        error = (mine - theirs).norm(dim=1)
        return bool(error.norm() <= _ROUNDING * size.norm()) and bool((error <= _ONE_MATRIX * size).all())


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


def backbone_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """`named_parameters`, likewise, each with the module that owns it."""
    seen: set[nn.Parameter] = set()
    for name, module in backbone_modules(model):
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter not in seen:
                seen.add(parameter)
                yield f"{name}.{leaf}" if name else leaf, parameter, module


def fingerprint(model: nn.Module, *, skip: frozenset[str] = frozenset()) -> Fingerprint:
    """Digest names, shapes and 64 evenly spaced values of every parameter, except `skip` and the library's own.

    Values are rounded to bfloat16 first, so a float32 checkpoint loaded in bfloat16 keeps its fingerprint. Loaded in
    float16 it may get another: small values become 0, and rounding twice can give another value. It takes milliseconds,
    because it reads a tiny share of a large model. Sharded weights are gathered one after the other, so all processes
    have to call this together.
    """
    reshard(model)
    shapes, values = hashlib.sha256(), hashlib.sha256()
    for name, parameter, owner in _parameters(model, skip):
        if is_quantized(parameter):
            unpack(owner)
        shapes.update(f"{name}:{full_shape(parameter)};".encode())
        for part in parts(whole(parameter.detach())):
            if part.device.type != "meta" and (part.is_floating_point() or is_quantized(parameter)):
                values.update(_sampled(part, _SAMPLES).numpy().tobytes())
    return Fingerprint(
        model_class=class_name(model),
        shapes=shapes.hexdigest()[:32],
        values=values.hexdigest()[:32],
        heads=tuple(sorted(skip)),
    )


def backbone_fingerprint(model: nn.Module, *, skip: frozenset[str] = frozenset()) -> Fingerprint:
    """The `fingerprint` of the model with the original values of all elements that a sparse delta tunes.

    It also holds what recognises the backbone in another precision, see `Fingerprint.is_quantization_of`.
    """
    with ExitStack() as stack:
        for _, module in backbone_modules(model):
            delta = module._modules.get(DELTA)
            if delta is not None:
                stack.enter_context(cast(Any, delta).disabled())
        return fingerprint(model, skip=skip).model_copy(update=_in_any_precision(model, skip))


def _in_any_precision(model: nn.Module, skip: frozenset[str]) -> dict[str, Any]:
    """The fields of a fingerprint that a quantised model and the original can be compared by."""
    exact, samples, quantized = hashlib.sha256(), [], False
    for name, parameter, owner in _parameters(model, skip):
        values = dequantized(owner, name.rpartition(".")[2])
        if values is None:
            return {}
        quantized |= is_quantized(parameter)
        if values.dim() < 2 or isinstance(owner, nn.Embedding):
            exact.update(_sampled(values, _SAMPLES).numpy().tobytes())
        else:
            few = _sampled(values, _FEW)
            samples.append(F.pad(few, (0, _FEW - len(few))))
    written = base64.b64encode(torch.cat(samples).numpy().tobytes()).decode() if samples else ""
    return {"exact": exact.hexdigest()[:32], "samples": written, "quantized": quantized}


def _parameters(model: nn.Module, skip: frozenset[str]) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    """The backbone's parameters in the order of their names, each with the module that owns it."""
    found = {plain_name(name): (parameter, owner) for name, parameter, owner in backbone_parameters(model)}
    for name, (parameter, owner) in sorted(found.items()):
        if name not in skip:
            yield name, parameter, owner


def _sampled(values: Tensor, count: int) -> Tensor:
    """Up to `count` evenly spaced values, as the bits of their bfloat16."""
    flat = values.reshape(-1)
    return flat[:: max(1, flat.numel() // count)][:count].to("cpu", torch.bfloat16).view(torch.int16)


def _read(samples: str) -> Tensor:
    """The samples of a fingerprint, (parameters, samples of each)."""
    bits = torch.frombuffer(bytearray(base64.b64decode(samples)), dtype=torch.int16)
    return bits.view(torch.bfloat16).float().view(-1, _FEW)
