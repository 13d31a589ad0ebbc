"""For tests of this package and of yours: tiny backbones of many families, and a contract for each kind of extension:
paths, importance and placement scores, noises and perturbations, strategies of continual tuning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gatedadapters.testing.backbones import FAMILIES, tiny
from gatedadapters.testing.contracts import PathContract
from gatedadapters.testing.placement_contract import PlacementScoreContract
from gatedadapters.testing.robustness_contract import CorruptionContract
from gatedadapters.testing.score_contract import ScoreContract

if TYPE_CHECKING:
    from gatedadapters.testing.strategy_contract import StrategyContract

__all__ = [
    "FAMILIES",
    "CorruptionContract",
    "PathContract",
    "PlacementScoreContract",
    "ScoreContract",
    "StrategyContract",
    "tiny",
]


def __getattr__(name: str) -> Any:
    if name == "StrategyContract":  # transformers' Trainer takes seconds to import
        return getattr(import_module("gatedadapters.testing.strategy_contract"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
