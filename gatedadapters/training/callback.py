"""A callback that tells the clock of optimiser steps about a Trainer's optimiser."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gatedadapters.runtime.steps import CLOCK


class FollowOptimizer(TrainerCallback):
    """Hands a Trainer's optimiser to the clock when training begins, with the number of steps in a checkpoint.

    The Trainers of this package have this callback already. Any other transformers Trainer needs it to resume a run in
    which `weaken_knowledge` follows a `ga.Ramp`::

        with ga.weaken_knowledge(model, drop=ga.Ramp(end=0.2), total_steps=1000):
            Trainer(model, args, train_dataset=..., callbacks=[ga.FollowOptimizer()]).train(resume_from_checkpoint=True)
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Called once the Trainer has made its optimiser and, in a resumed run, loaded its state."""
        if optimizer is not None:
            CLOCK.training_begins(optimizer)
