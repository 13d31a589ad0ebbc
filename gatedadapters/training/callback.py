"""What tells the clock of optimiser steps about a Trainer's optimiser."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gatedadapters.runtime.steps import CLOCK


class FollowOptimizer(TrainerCallback):
    """Hands a Trainer's optimiser in as training begins, so that what a checkpoint says of past steps is taken up.

    The Trainers of this package have it already. Any other transformers Trainer needs it where a `ga.Ramp` of
    `weaken_knowledge` has to go on in a resumed run::

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
        """The Trainer has made its optimiser, and loaded its state where it resumes."""
        if optimizer is not None:
            CLOCK.training_begins(optimizer)
