"""Saved adapters: reading them back."""

from gatedadapters.artifacts.load import load_adapters

__all__ = ["load_adapters"]
