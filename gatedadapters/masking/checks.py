"""Whether a sparse delta may go into a model; each of these raises before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gatedadapters.errors import AttachError, MaskError
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.supernet import NAME as ADAPTERS


def tunable(model: nn.Module, names: Sequence[str], *, where: str) -> dict[str, nn.Parameter]:
    """The model's parameters by name, among which are those that a mask selects from."""
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
    """Raise where single elements of a weight cannot be trained, or the mask is of another one."""
    plain = type(weight) in (nn.Parameter, Tensor) and weight.layout == torch.strided
    if not weight.is_floating_point() or not plain or weight.element_size() < 2:
        raise MaskError(
            "these weights cannot be tuned element by element",
            expected="floating-point parameters of 16 bits or more",
            got=f"{weight.dtype} ({type(weight).__name__})",
            where=name,
            fix="load the model without quantisation, or exclude them from the mask",
        )
    if tuple(weight.shape) != shape:
        raise MaskError(
            "a tensor has another shape than the mask says",
            expected=shape,
            got=tuple(weight.shape),
            where=name,
            fix="use the model the mask was made for",
        )
    if not weight.is_contiguous() or weight.device.type == "meta":
        raise MaskError(
            "these weights cannot be written in place",
            expected="a contiguous tensor with memory",
            got="meta" if weight.device.type == "meta" else "strides of another layout",
            where=name,
            fix="make it contiguous before",
        )


def check_heads(values: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Raise where what task heads had learned does not fit those of the model."""
    for name, value in values.items():
        if name in parameters and parameters[name].shape != value.shape:
            raise MaskError(
                "a task head has another shape than what was learned for it",
                expected=tuple(value.shape),
                got=tuple(parameters[name].shape),
                where=name,
                fix="use a model with as many classes",
            )


def check_adapters(model: nn.Module, names: set[str]) -> None:
    """Raise where adapters in the model have to do with a weight that a delta is to tune: one would hide the other."""
    adapters = getattr(model, ADAPTERS, None)
    taken = {"head_names": "task head of the adapters", "replaced": "weight that adapters are merged into"}
    for attribute, what in taken.items():
        for name in sorted(names.intersection(getattr(adapters, attribute, ()))):
            raise AttachError(
                f"the mask selects elements of a {what}",
                expected="a weight of the backbone's own",
                got=name,
                where=type(model).__name__,
                fix="exclude it from the mask, or unmerge or detach the adapters first",
            )
    for key, path in adapters.typed_paths() if isinstance(adapters, Adapters) else ():
        if path.site.at_weight and str(path.site.write) in names:
            raise AttachError(
                "an adapter's path stands at this weight",
                expected="a weight of the backbone's own",
                got=f"path {key}",
                where=str(path.site.write),
                fix="exclude it from the mask, or search without weight_lora",
            )
