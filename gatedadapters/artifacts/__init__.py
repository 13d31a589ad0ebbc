"""Saved adapters: reading them back, one or several on a model."""

from gatedadapters.artifacts.load import load_adapters
from gatedadapters.artifacts.shelf import Shelf

__all__ = ["Shelf", "load_adapters"]
