"""Discovers how a backbone is built, and keeps account of what is attached to it."""

from gatedadapters.backbone.layout import Block, Layout, LinearMap, Norm, Sublayer, Unknown, discover

__all__ = ["Block", "Layout", "LinearMap", "Norm", "Sublayer", "Unknown", "discover"]
