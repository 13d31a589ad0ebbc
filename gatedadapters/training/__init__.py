"""Trainers for gated and masked models, built on transformers' Trainer, for one task or many."""

from gatedadapters.training.callback import FollowOptimizer
from gatedadapters.training.gated import GatedClass, SelectiveClass, gated, selective
from gatedadapters.training.multitask import MultiTaskClassifier, MultiTaskConfig
from gatedadapters.training.selective import SelectiveTrainer
from gatedadapters.training.token_adaptive import TokenAdaptiveLoss
from gatedadapters.training.trainer import GatedTrainer

__all__ = [
    "FollowOptimizer",
    "GatedClass",
    "GatedTrainer",
    "MultiTaskClassifier",
    "MultiTaskConfig",
    "SelectiveClass",
    "SelectiveTrainer",
    "TokenAdaptiveLoss",
    "gated",
    "selective",
]
