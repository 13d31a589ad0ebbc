"""Real pretrained models and real labelled texts that packages of the package index carry.

Nothing is downloaded at run time, and no such package is imported: its files are found and read. If a package is
missing, the error names the command that installs it.
"""

from gatedadapters.data.bundled.choices import CHOICE_TASKS, load_choices
from gatedadapters.data.bundled.corpora import CORPORA, load_corpus
from gatedadapters.data.bundled.models import (
    MODELS,
    load_encoder,
    load_minilm_l3,
    load_smollm2,
    model_folder,
)
from gatedadapters.data.bundled.packages import PACKAGES, Package, is_available
from gatedadapters.data.bundled.texts import TEXT_TASKS, load_task

__all__ = [
    "CHOICE_TASKS",
    "CORPORA",
    "MODELS",
    "PACKAGES",
    "TEXT_TASKS",
    "Package",
    "is_available",
    "load_choices",
    "load_corpus",
    "load_encoder",
    "load_minilm_l3",
    "load_smollm2",
    "load_task",
    "model_folder",
]
