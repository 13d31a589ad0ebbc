"""Adapters whose place, kind and size are learned."""

from gatedadapters.adapters import Adapters, attach, detach, get_adapters
from gatedadapters.backbone import Layout, discover
from gatedadapters.config import L0, Budget, GateConfig, Schedule, SearchSpace
from gatedadapters.structure import Structure
from gatedadapters.training import GatedTrainer, MultiTaskClassifier

__version__ = "0.1.0"
__all__ = [
    "L0", "Adapters", "Budget", "GateConfig", "GatedTrainer", "Layout", "MultiTaskClassifier", "Schedule", "SearchSpace",
    "Structure", "attach", "detach", "discover", "get_adapters",
]  # fmt: skip
