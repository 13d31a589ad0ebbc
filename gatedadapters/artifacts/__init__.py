"""Saved adapters: reading them back, and exchanging them with peft."""

from gatedadapters.artifacts.export_peft import export_peft
from gatedadapters.artifacts.import_peft import import_peft, singular_values
from gatedadapters.artifacts.load import load_adapters

__all__ = ["export_peft", "import_peft", "load_adapters", "singular_values"]
