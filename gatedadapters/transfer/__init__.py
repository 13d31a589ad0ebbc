"""Adapters that survive an update of their base model."""

from gatedadapters.transfer.feed_forward import FeedForward, feed_forwards
from gatedadapters.transfer.weakening import Weakening, restore_knowledge, weaken_knowledge

__all__ = ["FeedForward", "Weakening", "feed_forwards", "restore_knowledge", "weaken_knowledge"]
