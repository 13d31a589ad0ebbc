"""Saved adapters and deltas: reading them back, one or several on a model, and exchanging adapters with peft."""

from gatedadapters.artifacts.export_gguf import export_gguf
from gatedadapters.artifacts.export_peft import export_peft
from gatedadapters.artifacts.import_adapterhub import import_adapterhub
from gatedadapters.artifacts.import_peft import import_peft, singular_values
from gatedadapters.artifacts.joint import budget_report, load_joint, save_joint
from gatedadapters.artifacts.load import load_adapters
from gatedadapters.artifacts.merge_into import merge_into
from gatedadapters.artifacts.normalise import Normalised, normalise
from gatedadapters.artifacts.shelf import Shelf

__all__ = [
    "Normalised",
    "Shelf",
    "budget_report",
    "export_gguf",
    "export_peft",
    "import_adapterhub",
    "import_peft",
    "load_adapters",
    "load_joint",
    "merge_into",
    "normalise",
    "save_joint",
    "singular_values",
]
