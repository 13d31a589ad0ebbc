"""What of a model may be trained while adapters, a shelf or a sparse delta are in it, and how that comes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from gatedadapters.backbone.fingerprint import OWN_MODULES, is_own
from gatedadapters.errors import AttachError


def trained_originally(model: nn.Module) -> frozenset[str]:
    """Names of the backbone's parameters that required gradients before anything of ours came into the model.

    Whoever comes second takes over the record of who is there already: what it finds itself is a frozen model.
    """
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad and not is_own(name)}
    for prefix, owner in _owners(model):
        names = {name for name in names if not name.startswith(prefix)}
        names |= {f"{prefix}{name}" for name in owner._required_grad}
    return frozenset(names)


def apply_requires_grad(model: nn.Module, originally: frozenset[str]) -> None:
    """Let the backbone's parameters require gradients as whoever is in the model asks: their task heads do, the rest
    does not. Where nobody is left, it is as `originally` again.
    """
    owners = list(_owners(model))
    for name, parameter in model.named_parameters():
        if is_own(name):
            continue
        over = [(prefix, owner) for prefix, owner in owners if name.startswith(prefix)]
        wanted = any(name.removeprefix(prefix) in owner.head_names for prefix, owner in over)
        parameter.requires_grad_(wanted if over else name in originally)


def check_heads_untuned(model: nn.Module, head_names: Sequence[str]) -> None:
    """See that no sparse delta tunes elements of task heads that are to be trained in full.

    Raises:
        AttachError: naming the head.
    """
    for name in head_names:
        path, _, leaf = name.rpartition(".")
        if leaf in model.get_submodule(path).__dict__:  # what stands in for a weight hides the parameter there
            raise AttachError(
                "a sparse delta tunes elements of a task head",
                expected="heads that are trained in full or not at all",
                got=f"elements of {name} in the delta's mask",
                where=type(model).__name__,
                fix="exclude it from the mask, or pass heads= without it",
            )


def _owners(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Whoever is registered in the model or in a part of it, and the prefix of the parameters it is over."""
    for path, module in model.named_modules():
        for name in () if is_own(path) else OWN_MODULES:
            owner = module._modules.get(name)
            if owner is not None:
                yield f"{path}." if path else "", owner
