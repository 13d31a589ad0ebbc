"""For tests, here and of outsiders: tiny backbones of many families, and the contracts of a path and a score."""

from gatedadapters.testing.backbones import FAMILIES, tiny
from gatedadapters.testing.contracts import PathContract
from gatedadapters.testing.score_contract import ScoreContract

__all__ = ["FAMILIES", "PathContract", "ScoreContract", "tiny"]
