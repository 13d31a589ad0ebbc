"""Whole runs from Python, in the words of the command line: from one configuration to one output folder.

Every run takes a configuration (or the path of its YAML file), the output folder and `overwrite`. It writes into that
folder and returns a small frozen result, whose text is what the command prints:

    from gatedadapters import experiments

    result = experiments.search("search.yaml", out="runs/first")
    print(result.table())

`plan`, `show`, `load` and `predict` train nothing: they take a model and a search space, or a saved adapter, and write
no folder. `export` writes a saved adapter for another library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatedadapters.experiments.arms import Arm
    from gatedadapters.experiments.evaluation import TaskScore
    from gatedadapters.experiments.repairs import RepairReport
    from gatedadapters.experiments.run_allocate import AllocateResult, allocate
    from gatedadapters.experiments.run_compress import CompressResult, compress
    from gatedadapters.experiments.run_continual import ContinualResult, continual
    from gatedadapters.experiments.run_export import export
    from gatedadapters.experiments.run_plan import BudgetPlan, PlacePlan, Plan, plan
    from gatedadapters.experiments.run_predict import Loaded, Prediction, Predictions, load, predict
    from gatedadapters.experiments.run_search import SearchResult, search
    from gatedadapters.experiments.run_select import SelectResult, select
    from gatedadapters.experiments.run_transfer import TransferResult, transfer
    from gatedadapters.experiments.saved import show

__all__ = [
    "AllocateResult",
    "Arm",
    "BudgetPlan",
    "CompressResult",
    "ContinualResult",
    "Loaded",
    "PlacePlan",
    "Plan",
    "Prediction",
    "Predictions",
    "RepairReport",
    "SearchResult",
    "SelectResult",
    "TaskScore",
    "TransferResult",
    "allocate",
    "compress",
    "continual",
    "export",
    "load",
    "plan",
    "predict",
    "search",
    "select",
    "show",
    "transfer",
]

# A training run imports transformers' Trainer, TensorBoard and matplotlib; `show` and `plan` need none of them.
_FILES = {
    "arms": ("Arm",),
    "evaluation": ("TaskScore",),
    "run_allocate": ("AllocateResult", "allocate"),
    "run_compress": ("CompressResult", "compress"),
    "run_continual": ("ContinualResult", "continual"),
    "run_export": ("export",),
    "run_plan": ("BudgetPlan", "PlacePlan", "Plan", "plan"),
    "run_predict": ("Loaded", "Prediction", "Predictions", "load", "predict"),
    "run_search": ("SearchResult", "search"),
    "run_select": ("SelectResult", "select"),
    "repairs": ("RepairReport",),
    "run_transfer": ("TransferResult", "transfer"),
    "saved": ("show",),
}
_ON_USE = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return getattr(import_module(f"{__name__}.{_ON_USE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
