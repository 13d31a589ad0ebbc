"""For tests, here and of outsiders: tiny backbones of many families, the contracts of a path, a score, a noise."""

from gatedadapters.testing.backbones import FAMILIES, tiny
from gatedadapters.testing.contracts import PathContract
from gatedadapters.testing.robustness_contract import CorruptionContract
from gatedadapters.testing.score_contract import ScoreContract

__all__ = ["FAMILIES", "CorruptionContract", "PathContract", "ScoreContract", "tiny"]
