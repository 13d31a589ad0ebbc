"""Measures by name: what is reported of held-out examples beside the loss. Users register their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from gatedadapters.errors import ConfigError

Measure = Callable[[nn.Module, PreTrainedTokenizerBase, Sequence[Any]], float]
"""From a model in evaluation mode, its tokenizer and held-out examples (`Passage`, `Conversation`, `ChoiceExample`) to
a number."""

EXACT_MATCH = "exact_match"
_MEASURES: dict[str, Measure] = {}


def register_measure(name: str) -> Callable[[Measure], Measure]:
    """Make a measure of your own known by a name, which a task then lists under `measures`. A decorator.

    The measure may call the model or its `generate`: where adapters hold several tasks, the gates are those of the task
    that is measured. A module that an installed package names under the entry-point group `gatedadapters` registers its
    measures for the command line.

    Args:
        name: a name that is not taken.

    Raises:
        ConfigError: the name is `loss`, `accuracy` or `exact_match`, which the library itself measures.
    """
    if name in ("loss", "accuracy", EXACT_MATCH):
        raise ConfigError(
            "this measure is the library's own",
            expected="another name",
            got=repr(name),
            where="register_measure",
            fix=f"call it my_{name}",
        )

    def register(measure: Measure) -> Measure:
        _MEASURES[name] = measure
        return measure

    return register


def measure(name: str, where: str = "measures") -> Measure:
    """The measure that was registered under a name.

    Args:
        name: the name.
        where: what asks for it, for errors.

    Raises:
        ConfigError: there is none.
    """
    if name not in _MEASURES:
        raise ConfigError(
            "no such measure",
            expected=", ".join((EXACT_MATCH, *sorted(_MEASURES))),
            got=repr(name),
            where=where,
            fix="register it with gatedadapters.data.register_measure; loss and accuracy are always reported",
        )
    return _MEASURES[name]
