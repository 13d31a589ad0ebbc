"""Saved adapters: reading them back, one or several on a model, and exchanging them with peft."""

from gatedadapters.artifacts.export_peft import export_peft
from gatedadapters.artifacts.import_peft import import_peft, singular_values
from gatedadapters.artifacts.load import load_adapters
from gatedadapters.artifacts.shelf import Shelf

__all__ = ["Shelf", "export_peft", "import_peft", "load_adapters", "singular_values"]
