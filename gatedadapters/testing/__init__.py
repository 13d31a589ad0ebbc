"""For tests of this package and of yours: tiny backbones of many families, and contracts of paths, scores and noise."""

from gatedadapters.testing.backbones import FAMILIES, tiny
from gatedadapters.testing.contracts import PathContract
from gatedadapters.testing.robustness_contract import CorruptionContract
from gatedadapters.testing.score_contract import ScoreContract

__all__ = ["FAMILIES", "CorruptionContract", "PathContract", "ScoreContract", "tiny"]
