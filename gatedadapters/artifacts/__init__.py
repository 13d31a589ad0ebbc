"""Saved adapters and deltas: reading them back, and both together."""

from gatedadapters.artifacts.joint import budget_report, load_joint, save_joint
from gatedadapters.artifacts.load import load_adapters

__all__ = ["budget_report", "load_adapters", "load_joint", "save_joint"]
