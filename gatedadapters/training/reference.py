"""The frozen model that preference and reinforcement learning compare with: the trained one, adapters off."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from gatedadapters.backbone.fingerprint import is_own
from gatedadapters.errors import TrainingError
from gatedadapters.supernet.adapters import get_adapters


class AdaptersOff(nn.Module):
    """A module that computes what `model` does without its adapters. It owns no parameters, so it takes no memory.

    TRL's trainers take it for a reference model. They patch the `forward` of what they are given; calls go to the
    model as it is, with whatever TRL has patched there.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]  # a list, so that the model's parameters are not registered here

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self._model[0].config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model with its adapters disabled, in this thread alone."""
        (model,) = self._model
        with get_adapters(model).disabled():
            return model(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same as a call."""
        return self(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The backbone's values: TRL stores reference scores under a digest of them."""
        state: dict[str, Tensor] = self._model[0].state_dict()
        return {name: value for name, value in state.items() if not is_own(name)}


@contextmanager
def reference_by_switching_off(trainer: Trainer, model: nn.Module, given: dict[str, Any]) -> Iterator[None]:
    """While `trainer` is initialised with the arguments `given`, keep it from loading a second model as reference.

    DPO and KTO take a reference model as an argument, which is filled in here unless the user gave one. GRPO and RLOO
    take none: they load one in their `__init__` unless `beta`, the weight of the comparison, is 0. It is 0 meanwhile.

    Raises:
        TrainingError: the reference is to follow the trained model, which takes a second model.
    """
    initialisers = [vars(kind)["__init__"] for kind in type(trainer).__mro__ if "__init__" in vars(kind)]
    is_argument = any("ref_model" in inspect.signature(function).parameters for function in initialisers)
    settings = given.get("args")
    beta = getattr(settings, "beta", None)
    if given.get("ref_model") is not None or not (is_argument or beta):
        yield
        return
    if getattr(settings, "sync_ref_model", False):
        raise TrainingError(
            "the reference is the backbone, which does not change",
            expected="sync_ref_model=False, or a ref_model of its own",
            got="sync_ref_model=True",
            where=type(settings).__name__,
            fix="leave it out, or pass ref_model= where the trainer takes one",
        )
    if is_argument:
        given["ref_model"] = AdaptersOff(model)
        yield
        return
    assert settings is not None
    settings.beta = 0.0
    try:
        yield
    finally:
        settings.beta = beta
    initialised: dict[str, Any] = vars(trainer)
    if "ref_model" in initialised:
        initialised |= {"beta": beta, "ref_model": AdaptersOff(model)}
    elif "beta" in initialised:
        initialised["beta"] = beta
