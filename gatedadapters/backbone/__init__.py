"""Discovering how a backbone is built."""

from gatedadapters.backbone.layout import Block, Layout, LinearMap, Sublayer, Unknown, discover

__all__ = ["Block", "Layout", "LinearMap", "Sublayer", "Unknown", "discover"]
