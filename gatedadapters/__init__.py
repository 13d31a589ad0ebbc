"""Adapters whose place, kind and size are learned."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gatedadapters.allocation import Placement, allocate, place
from gatedadapters.artifacts import (
    Shelf,
    budget_report,
    export_gguf,
    export_peft,
    import_adapterhub,
    import_peft,
    load_adapters,
    load_joint,
    merge_into,
    normalise,
    save_joint,
)
from gatedadapters.backbone import Layout, discover
from gatedadapters.config import L0, Budget, GateConfig, Ramp, Schedule, SearchSpace, SelectionConfig
from gatedadapters.masking import (
    ElasticPenalty,
    Mask,
    Scores,
    SparseDelta,
    SubspaceDelta,
    TuningTrial,
    apply_mask,
    apply_subspace,
    get_delta,
    load_delta,
    load_subspace,
    score,
    select,
    train_last_blocks,
)
from gatedadapters.structure import Structure
from gatedadapters.supernet.adapters import Adapters, get_adapters
from gatedadapters.supernet.attach import attach, detach
from gatedadapters.transfer import predict_damage, weaken_knowledge

if TYPE_CHECKING:
    from gatedadapters import experiments
    from gatedadapters.continual import StreamResult, Task, TaskStream, probe, run_stream, select_core
    from gatedadapters.experiments import load
    from gatedadapters.studies import Study
    from gatedadapters.training import (
        FollowOptimizer,
        GatedTrainer,
        MultiTaskClassifier,
        SelectiveTrainer,
        TokenAdaptiveLoss,
        gated,
        selective,
    )
    from gatedadapters.transfer import repair

__version__ = "0.2.0"
__all__ = [
    "L0",
    "Adapters",
    "Budget",
    "ElasticPenalty",
    "FollowOptimizer",
    "GateConfig",
    "GatedTrainer",
    "Layout",
    "Mask",
    "MultiTaskClassifier",
    "Placement",
    "Ramp",
    "Schedule",
    "Scores",
    "SearchSpace",
    "SelectionConfig",
    "SelectiveTrainer",
    "Shelf",
    "SparseDelta",
    "StreamResult",
    "Structure",
    "Study",
    "SubspaceDelta",
    "Task",
    "TaskStream",
    "TokenAdaptiveLoss",
    "TuningTrial",
    "allocate",
    "apply_mask",
    "apply_subspace",
    "attach",
    "budget_report",
    "detach",
    "discover",
    "experiments",
    "export_gguf",
    "export_peft",
    "gated",
    "get_adapters",
    "get_delta",
    "import_adapterhub",
    "import_peft",
    "load",
    "load_adapters",
    "load_delta",
    "load_joint",
    "load_subspace",
    "merge_into",
    "normalise",
    "place",
    "predict_damage",
    "probe",
    "repair",
    "run_stream",
    "save_joint",
    "score",
    "select",
    "select_core",
    "selective",
    "train_last_blocks",
    "weaken_knowledge",
]

# transformers' Trainer imports peft and more: only those who train pay for it.
_ON_USE = {
    **dict.fromkeys(
        (
            *("FollowOptimizer", "GatedTrainer", "MultiTaskClassifier", "SelectiveTrainer", "TokenAdaptiveLoss"),
            *("gated", "selective"),
        ),
        "gatedadapters.training",
    ),
    **dict.fromkeys(
        ("StreamResult", "Task", "TaskStream", "probe", "run_stream", "select_core"), "gatedadapters.continual"
    ),
    "Study": "gatedadapters.studies",
    "repair": "gatedadapters.transfer",
    "load": "gatedadapters.experiments",
}


def __getattr__(name: str) -> Any:
    if name == "experiments":
        return import_module("gatedadapters.experiments")
    if name in _ON_USE:
        return getattr(import_module(_ON_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
