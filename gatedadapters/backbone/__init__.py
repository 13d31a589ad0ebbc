"""Discovers how a backbone is built, and keeps account of what is attached to it."""

from gatedadapters.backbone.layout import Block, Layout, LinearMap, Sublayer, Unknown, discover

__all__ = ["Block", "Layout", "LinearMap", "Sublayer", "Unknown", "discover"]
