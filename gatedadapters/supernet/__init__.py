"""Gated candidates inside a model: putting them in, running them, and what users call to train and shrink them."""

from gatedadapters.supernet.adapters import Adapters, get_adapters
from gatedadapters.supernet.attach import attach, detach

__all__ = ["Adapters", "attach", "detach", "get_adapters"]
