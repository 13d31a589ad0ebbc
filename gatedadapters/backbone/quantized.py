"""Quantised backbones: weights that are not one floating-point tensor, and modules that may pass no gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gatedadapters.errors import AttachError


def is_quantized(weight: object) -> bool:
    """Whether `weight` is not a floating-point tensor: integers, packed values, or parts with scales.

    A wrapper of torch's own (DTensor) counts as the tensor it wraps.
    """
    if not isinstance(weight, Tensor):
        return weight is not None
    wrapped = is_traceable_wrapper_subclass(weight) and not type(weight).__module__.startswith("torch.")
    return wrapped or not weight.is_floating_point()


def parts(weight: Tensor) -> list[Tensor]:
    """The plain tensors of a weight: integers and scales if it is quantised, else the weight itself."""
    if not (is_quantized(weight) and is_traceable_wrapper_subclass(weight)):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in parts(getattr(weight, name))]


def check_gradients_pass(model: nn.Module) -> None:
    """Run each quantised linear module on two rows of ones, forward and backward.

    Adapters in earlier blocks get their gradients through these modules.

    Raises:
        AttachError: a module does not run on its own, or gives its input no gradient; names the module and the cause.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for name, module in _quantized_modules(model):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.is_meta:
            continue
        own = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else dtype
        device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
        x = torch.ones(2, int(module.in_features), dtype=own, device=device, requires_grad=True)  # type: ignore[arg-type]
        try:
            with torch.enable_grad():
                out: Any = module.forward(x)
                y: Tensor = out if isinstance(out, Tensor) else out[0]
                gradient = torch.autograd.grad(y.float().sum(), x)[0] if y.requires_grad else None
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        else:
            if gradient is not None and bool(gradient.isfinite().all()):
                continue
            problem = "no gradient for its input" if gradient is None else "a gradient that is not finite"
        raise AttachError(
            "adapters cannot be trained over this quantisation",
            expected="linear modules that run, and give their input a gradient",
            got=problem,
            where=f"{name}, a {type(module).__name__} with a weight of type {type(weight).__name__}",
            fix="quantise weights only (torchao: Int8WeightOnlyConfig), or attach to the model without quantisation",
        )


def _quantized_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        if all(isinstance(width, int) for width in widths) and is_quantized(getattr(module, "weight", None)):
            yield name, module
