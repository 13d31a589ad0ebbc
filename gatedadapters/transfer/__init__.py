"""Adapters that stay valid when their base model is updated: how to train them, and how to measure what they keep."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gatedadapters.transfer.damage import Damage, SiteDamage, predict_damage
from gatedadapters.transfer.evaluate import (
    Recovery,
    TransferReport,
    TransferScores,
    evaluate_transfer,
    recovery,
    transfer_scores,
)
from gatedadapters.transfer.feed_forward import FeedForward, feed_forwards
from gatedadapters.transfer.sensitivity import knowledge_sensitivity, prefer_transferable
from gatedadapters.transfer.shift import ActivationShift, PointShift, activation_shift, check_versions
from gatedadapters.transfer.weakening import Weakening, restore_knowledge, weaken_knowledge

if TYPE_CHECKING:
    from gatedadapters.transfer.repairing import Repair, repair, teacher_outputs
    from gatedadapters.transfer.update import UpdateReport, simulate_update

__all__ = [
    "ActivationShift",
    "Damage",
    "FeedForward",
    "PointShift",
    "Recovery",
    "Repair",
    "SiteDamage",
    "TransferReport",
    "TransferScores",
    "UpdateReport",
    "Weakening",
    "activation_shift",
    "check_versions",
    "evaluate_transfer",
    "feed_forwards",
    "knowledge_sensitivity",
    "predict_damage",
    "prefer_transferable",
    "recovery",
    "repair",
    "restore_knowledge",
    "simulate_update",
    "teacher_outputs",
    "transfer_scores",
    "weaken_knowledge",
]


_ON_USE = {  # transformers' Trainer imports peft and more
    **dict.fromkeys(("UpdateReport", "simulate_update"), "gatedadapters.transfer.update"),
    **dict.fromkeys(("Repair", "repair", "teacher_outputs"), "gatedadapters.transfer.repairing"),
}


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        return getattr(import_module(_ON_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
