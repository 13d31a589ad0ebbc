"""Checks that a sparse delta fits a model. They all run before the model is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gatedadapters.backbone.quantized import is_quantized
from gatedadapters.errors import AttachError, MaskError
from gatedadapters.runtime.sharding import is_shard, local
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.supernet import NAME as ADAPTERS


def parameters_of(model: nn.Module, names: Sequence[str], *, where: str) -> dict[str, nn.Parameter]:
    """All parameters of the model by name, after a check that `names` are among them.

    Raises:
        MaskError: a parameter is missing.
    """
    parameters = dict(model.named_parameters())
    missing = [name for name in names if name not in parameters]
    if missing:
        raise MaskError(
            "the model lacks parameters that the mask selects from",
            expected=missing[0],
            got="no such parameter",
            where=where,
            fix="use the model the mask was made for",
        )
    return parameters


def check_tensor(name: str, weight: Tensor, shape: tuple[int, ...]) -> None:
    """Check that single elements of a weight can be trained, and that it has the shape in the mask.

    Raises:
        MaskError: one of the two does not hold. The error names the tensor.
    """
    plain = is_shard(weight) or (type(weight) in (nn.Parameter, Tensor) and weight.layout == torch.strided)
    if is_quantized(weight) or not plain or weight.element_size() < 2:
        raise MaskError(
            "these weights cannot be tuned element by element",
            expected="floating-point parameters of 16 bits or more",
            got=f"{weight.dtype} ({type(weight).__name__})",
            where=name,
            fix="load the model without quantisation, or exclude them from the mask",
        )
    if tuple(weight.shape) != shape:
        raise MaskError(
            "a tensor and the mask differ in shape",
            expected=shape,
            got=tuple(weight.shape),
            where=name,
            fix="use the model the mask was made for",
        )
    if not local(weight).is_contiguous() or weight.device.type == "meta":
        raise MaskError(
            "these weights cannot be written in place",
            expected="a contiguous tensor with memory",
            got="meta" if weight.device.type == "meta" else "strides of another layout",
            where=name,
            fix="load the weights, or parameter.data = parameter.data.contiguous()",
        )


def check_head_shapes(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Check that the saved values of task heads fit the heads of the model.

    Raises:
        MaskError: a shape differs. The error names the tensor.
    """
    for name, value in values.items():
        if name in parameters and parameters[name].shape != value.shape:
            raise MaskError(
                "a task head and its saved values differ in shape",
                expected=tuple(value.shape),
                got=tuple(parameters[name].shape),
                where=name,
                fix="use a model with as many classes",
            )


def check_adapters(model: nn.Module, names: set[str]) -> None:
    """Check that no adapter in the model uses a weight of the delta: one would hide the other's changes.

    Args:
        model: a model with or without adapters.
        names: the parameters in which the delta tunes elements.

    Raises:
        AttachError: an adapter uses one. The error names the weight.
    """
    adapters = getattr(model, ADAPTERS, None)
    if not isinstance(adapters, Adapters):
        return
    merged = adapters.merged.originals if adapters.merged is not None else ()
    taken = {"task head of the adapters": adapters.head_names, "weight that adapters are merged into": merged}
    for what, taken_names in taken.items():
        for name in sorted(names.intersection(taken_names)):
            raise AttachError(
                f"the mask selects elements of a {what}",
                expected="a weight of the backbone's own",
                got=name,
                where=type(model).__name__,
                fix="exclude it from the mask, or unmerge or detach the adapters first",
            )
    for key, path in adapters.typed_paths():
        if path.site.at_weight and str(path.site.write) in names:
            raise AttachError(
                "a path of the adapters changes this weight",
                expected="a weight of the backbone's own",
                got=f"path {key}",
                where=str(path.site.write),
                fix="exclude it from the mask, or search without weight_lora",
            )
