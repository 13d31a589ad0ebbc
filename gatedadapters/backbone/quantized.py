"""Quantised backbones: weights that are not one floating-point tensor, and modules that may pass no gradient.

No quantiser is imported here. Weights of torchao are tensor subclasses that know how to `dequantize`; those of
bitsandbytes carry their scales beside them, in `quant_state` (4 bits) or in `SCB` (8 bits).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from gatedadapters.errors import AttachError
from gatedadapters.runtime.sharding import whole

_PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' 4-bit modules


def is_quantized(weight: object) -> bool:
    """Whether `weight` is not a floating-point tensor: integers, packed values, or parts with scales.

    A wrapper of torch's own (DTensor) counts as the tensor it wraps.
    """
    if not isinstance(weight, Tensor):
        return weight is not None
    wrapped = is_traceable_wrapper_subclass(weight) and not type(weight).__module__.startswith("torch.")
    # bitsandbytes may store 4-bit values in a tensor that calls itself bfloat16.
    return wrapped or not weight.is_floating_point() or _state(weight) is not None


def parts(weight: Tensor) -> list[Tensor]:
    """The plain tensors of a weight: integers and scales if it is quantised, else the weight itself."""
    if not (is_quantized(weight) and is_traceable_wrapper_subclass(weight)):
        return [weight]
    names, _ = weight.__tensor_flatten__()
    return [part for name in names for part in parts(getattr(weight, name))]


def is_packed(weight: object) -> bool:
    """Whether a weight is quantised and only its own module can multiply with it, as those of bitsandbytes."""
    return isinstance(weight, Tensor) and is_quantized(weight) and not is_traceable_wrapper_subclass(weight)


def full_shape(weight: Tensor) -> tuple[int, ...]:
    """The shape of the matrix that a weight stands for; 4-bit values are packed into a tensor of another shape."""
    state = _state(weight)
    return tuple(weight.shape if state is None else state.shape)


@torch.no_grad()
def dequantized(module: nn.Module, name: str = "weight") -> Tensor | None:
    """The floating-point values of a weight, a copy if it is quantised; None if nobody can tell them.
    A sharded weight is gathered, so all processes have to call this together.

    Args:
        module: owns the weight.
        name: of the parameter.
    """
    weight = module._parameters.get(name)
    if weight is None or weight.is_meta:
        return None
    if not is_quantized(weight):
        return whole(weight.detach())
    state = _state(weight)
    if state is not None:
        unpack(module)
        functional = import_module("bitsandbytes.functional")  # who quantised the weight has imported it
        return cast(Tensor, functional.dequantize_4bit(weight.data, _state(weight)))
    scales = getattr(weight, "SCB", None)
    if scales is None:  # bitsandbytes moves them at the first call
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if scales is not None and weight.dtype == torch.int8:
        return cast(Tensor, weight.data.float() * scales.float()[:, None] / 127)
    if is_traceable_wrapper_subclass(weight) and hasattr(weight, "dequantize"):
        return cast(Tensor, weight.dequantize()).detach()
    return None


def allow_packing(model: nn.Module, allowed: bool) -> None:
    """Let modules of bitsandbytes pack their 4-bit values for a faster kernel, or undo that and forbid it.

    On CPUs with bfloat16 arithmetic, a call in evaluation mode packs them for good. That kernel has no gradient: later
    training would go wrong with no more than a warning.
    """
    for module in model.modules():
        if hasattr(module, _PACKS):
            setattr(module, _PACKS, allowed and _cpu_packs())
            if not allowed:
                unpack(module)


def _cpu_packs() -> bool:
    return bool(import_module("bitsandbytes.functional").has_avx512bf16())


def unpack(module: nn.Module) -> None:
    """Undo what a call in evaluation mode did to the 4-bit values of a module; scales stay rounded to bfloat16."""
    weight = module._parameters.get("weight")
    if weight is None or not getattr(_state(weight), "packing_format_for_cpu", False):
        return
    module.state_dict()  # saving unpacks in place
    state = _state(weight)
    if state.absmax.dim() == 2:  # bitsandbytes 0.50 leaves scales that are not quantised themselves transposed
        state.absmax = state.absmax.t().reshape(-1).float()


def _state(weight: object) -> Any:
    """How bitsandbytes holds 4-bit values; None of other weights."""
    return getattr(weight, "quant_state", None)


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
            fix="quantise weights only (bitsandbytes: 4 or 8 bits; torchao: Int8WeightOnlyConfig), or attach to the "
            "model without quantisation",
        )


def _quantized_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
        if all(isinstance(width, int) for width in widths) and is_quantized(getattr(module, "weight", None)):
            yield name, module
