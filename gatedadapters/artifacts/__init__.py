"""Saved adapters and deltas: reading them back, one or several on a model, and exchanging adapters with peft."""

from gatedadapters.artifacts.export_peft import export_peft
from gatedadapters.artifacts.import_peft import import_peft, singular_values
from gatedadapters.artifacts.joint import budget_report, load_joint, save_joint
from gatedadapters.artifacts.load import load_adapters
from gatedadapters.artifacts.merge_into import merge_into
from gatedadapters.artifacts.shelf import Shelf

__all__ = [
    "Shelf",
    "budget_report",
    "export_peft",
    "import_peft",
    "load_adapters",
    "load_joint",
    "merge_into",
    "save_joint",
    "singular_values",
]
