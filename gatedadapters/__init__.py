"""Adapters whose place, kind and size are learned."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gatedadapters.adapters import Adapters, get_adapters
from gatedadapters.artifacts import load_adapters
from gatedadapters.attachment import attach, detach
from gatedadapters.backbone import Layout, discover
from gatedadapters.config import L0, Budget, GateConfig, Ramp, Schedule, SearchSpace
from gatedadapters.structure import Structure
from gatedadapters.transfer import weaken_knowledge

if TYPE_CHECKING:
    from gatedadapters.training import GatedTrainer, MultiTaskClassifier

__version__ = "0.1.0"
__all__ = [
    "L0",
    "Adapters",
    "Budget",
    "GateConfig",
    "GatedTrainer",
    "Layout",
    "MultiTaskClassifier",
    "Ramp",
    "Schedule",
    "SearchSpace",
    "Structure",
    "attach",
    "detach",
    "discover",
    "get_adapters",
    "load_adapters",
    "weaken_knowledge",
]

# transformers' Trainer imports peft and more: only those who train pay for it.
_ON_USE = {"GatedTrainer": "gatedadapters.training", "MultiTaskClassifier": "gatedadapters.training"}


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return getattr(import_module(_ON_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
