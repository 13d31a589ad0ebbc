"""Which parameters of a model require gradients while something is attached to it, and how they are restored.

Attached are adapters, a shelf or a sparse delta. Each saves the flags that it found, and lists its task heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from gatedadapters.backbone.fingerprint import OWN_MODULES, is_own
from gatedadapters.backbone.quantized import allow_packing
from gatedadapters.errors import AttachError
from gatedadapters.runtime.sharding import plain_name, reshard


def trained_originally(model: nn.Module) -> frozenset[str]:
    """Names of the backbone's parameters that required gradients before the library attached anything to the model.

    If something is already attached, its saved flags are copied: the live ones describe a frozen model.
    """
    reshard(model)
    named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    names = {name for name, parameter in named.items() if parameter.requires_grad and not is_own(name)}
    for prefix, owner in _owners(model):
        names = {name for name in names if not name.startswith(prefix)}
        names |= {f"{prefix}{name}" for name in owner._required_grad}
    return frozenset(names)


def apply_requires_grad(model: nn.Module, originally: frozenset[str]) -> None:
    """Set `requires_grad` of the backbone's parameters, after something was attached or detached.

    Under an attachment only its task heads require gradients. All other parameters get back the flags they had before
    anything was attached.

    Args:
        model: the model.
        originally: names of the parameters that required gradients at first, see `trained_originally`.
    """
    reshard(model)
    owners = list(_owners(model))
    allow_packing(model, not owners)
    for held, parameter in model.named_parameters():
        name = plain_name(held)
        if is_own(name):
            continue
        above = [(prefix, owner) for prefix, owner in owners if name.startswith(prefix)]
        wanted = any(name.removeprefix(prefix) in owner.head_names for prefix, owner in above)
        parameter.requires_grad_(wanted if above else name in originally)


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """Within this context gradients pass through 4-bit weights; after it, too, if something is attached by then."""
    allow_packing(model, False)
    try:
        yield
    finally:
        allow_packing(model, not list(_owners(model)))


def check_heads_untuned(model: nn.Module, head_names: Sequence[str]) -> None:
    """Check that no sparse delta tunes single elements of the task heads `head_names`, which will be trained in full.

    Raises:
        AttachError: a delta does; names the head.
    """
    for name in head_names:
        path, _, leaf = name.rpartition(".")
        if leaf in model.get_submodule(path).__dict__:  # a delta sets the tuned weight here
            raise AttachError(
                "the mask selects elements of a head that is trained in full",
                expected="elements of the backbone",
                got=name,
                where=type(model).__name__,
                fix="exclude it from the mask, or pass heads= without it",
            )


def _owners(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Everything that is attached to the model or to a part of it, with the name prefix of the part's parameters."""
    for path, module in model.named_modules():
        for name in () if is_own(path) else OWN_MODULES:
            owner = module._modules.get(name)
            if owner is not None:
                yield f"{path}." if path else "", owner
