"""Strategies for a stream of tasks, one file each. To add one: write its file, and name its class here."""

from collections.abc import Mapping
from typing import Any

from gatedadapters.config.deprecation import renamed
from gatedadapters.continual.strategies.base import Strategy, TunedStage
from gatedadapters.continual.strategies.carried import Carried
from gatedadapters.continual.strategies.cosine import Cosine
from gatedadapters.continual.strategies.ewc import EWC
from gatedadapters.continual.strategies.gated import Gated
from gatedadapters.continual.strategies.joint import Joint
from gatedadapters.continual.strategies.l2_fisher import L2Fisher
from gatedadapters.continual.strategies.lora import SequentialLoRA
from gatedadapters.continual.strategies.lota import LoTA
from gatedadapters.continual.strategies.o_lora import OLoRA
from gatedadapters.continual.strategies.osft import OSFT
from gatedadapters.continual.strategies.per_task import PerTask
from gatedadapters.continual.strategies.random import RandomCores
from gatedadapters.continual.strategies.replay import Replay
from gatedadapters.continual.strategies.sequential import Sequential
from gatedadapters.errors import ConfigError

_KINDS: dict[str, type[Strategy]] = {}


def register(strategy: type[Strategy]) -> type[Strategy]:
    """Make a strategy known by its kind. Usable as a decorator on a class of your own."""
    _KINDS[strategy.kind] = strategy
    return strategy


def strategy_kinds() -> dict[str, type[Strategy]]:
    """Every registered strategy by name."""
    return dict(_KINDS)


def resolve(strategy: str | Mapping[str, Any] | Strategy) -> Strategy:
    """A strategy from its name, or from its options with the name as `kind`; a `Strategy` is returned as it is.

    Raises:
        ConfigError: unknown name or options.
    """
    if isinstance(strategy, Strategy):
        return strategy
    data = {"kind": strategy} if isinstance(strategy, str) else dict(strategy)
    kind = data.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(
            "no such strategy",
            expected=", ".join(_KINDS),
            got=repr(kind),
            where="strategy",
            fix="choose one of these, or import the module that registers it",
        )
    return _KINDS[kind].parse(data, where=f"strategy {kind}")


for _kind in (
    L2Fisher,
    Cosine,
    Gated,
    Carried,
    RandomCores,
    LoTA,
    Sequential,
    SequentialLoRA,
    EWC,
    OLoRA,
    OSFT,
    Replay,
    PerTask,
    Joint,
):
    register(_kind)

__all__ = ["Strategy", "TunedStage", "register", "resolve", "strategy_kinds"]

__getattr__ = renamed(__name__, {"Tuned": "TunedStage"})
