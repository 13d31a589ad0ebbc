"""For tests, here and of outsiders: tiny backbones of many families, and the contract of a path."""

from gatedadapters.testing.backbones import FAMILIES, tiny
from gatedadapters.testing.contracts import PathContract

__all__ = ["FAMILIES", "PathContract", "tiny"]
