"""Training of one stage or probe with transformers' Trainer; a killed training goes on and ends with the same bits."""

from __future__ import annotations

import os
import shutil
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from gatedadapters.continual.measures import Collate
from gatedadapters.training import FollowOptimizer, GatedTrainer
from gatedadapters.training.checked import check_finite_loss, check_launch
from gatedadapters.training.rates import split_groups

COMPLETE = "complete"
"""Name of the file that marks a checkpoint as written to its end."""

CHECKPOINT_STEPS = 200
"""Steps between two checkpoints, where nothing else is configured."""

PenaltyTerm = Callable[[], Tensor]
"""Returns a differentiable scalar, which is added to the loss."""


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a stage is trained; everything that its training depends on, except data and seed.

    Attributes:
        steps: optimiser steps.
        batch_size: examples per step.
        learning_rate: peak learning rate of AdamW.
        head_learning_rate: peak learning rate of the parameters that are named as heads; None: that of the others.
        schedule: how the rate decays after the warm-up: `linear` or `cosine`.
        warmup: share of the steps in which the rate rises from 0.
        weight_decay: of AdamW.
        bf16: train in bfloat16 autocast.
        use_cpu: train on the CPU also where there is a GPU.
        checkpoint_steps: steps between two checkpoints; None: no checkpoints.
    """

    steps: int
    batch_size: int
    learning_rate: float
    head_learning_rate: float | None = None
    schedule: str = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.0
    bf16: bool = False
    use_cpu: bool = False
    checkpoint_steps: int | None = None


class _StageTraining(Trainer):
    """Gives heads a learning rate of their own, and adds a penalty to the loss.

    Attributes:
        penalty: added to the loss of every training step.
        heads: parameters with the heads' learning rate.
        head_rate: that rate; None: heads have the rate of all other parameters.
    """

    penalty: PenaltyTerm | None = None
    heads: tuple[nn.Parameter, ...] = ()
    head_rate: float | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimiser, with the heads in parameter groups of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.head_rate is not None:
            for index in split_groups(optimizer, self.heads):
                optimizer.param_groups[index]["lr"] = self.head_rate
        return optimizer

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The task's loss; while training, plus the penalty.

        Raises:
            TrainingError: the loss is not finite.
        """
        loss, outputs = cast(tuple[Tensor, Any], super().compute_loss(model, inputs, True, num_items_in_batch))
        if model.training and self.penalty is not None:
            loss = loss + self.penalty()
        if model.training:
            check_finite_loss(loss, self.state.global_step)
        return (loss, outputs) if return_outputs else loss


class StageTrainer(_StageTraining):
    """Trains whatever requires gradients. Its checkpoints hold those parameters alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(FollowOptimizer())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write the trained parameters only; all others are known from the stages before."""
        folder = str(output_dir if output_dir is not None else self.args.output_dir)
        os.makedirs(folder, exist_ok=True)
        model = cast(nn.Module, self.accelerator.unwrap_model(self.model))
        trained = {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}
        save_file(trained, os.path.join(folder, SAFE_WEIGHTS_NAME), metadata={"format": "pt"})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say nothing of missing keys: parameters that are not trained are not in a checkpoint."""


class GatedStageTrainer(_StageTraining, GatedTrainer):
    """Trains a gated search in a stage."""


class _MarkComplete(TrainerCallback):
    """Marks each checkpoint once all its files are written; checkpoints without the mark are not resumed from."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the mark."""
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def fit(
    model: nn.Module,
    data: Any,
    collate: Collate,
    recipe: Recipe,
    *,
    folder: Path,
    seed: int,
    heads: Sequence[str] = (),
    penalty: PenaltyTerm | None = None,
    gated: dict[str, Any] | None = None,
) -> float:
    """Train what requires gradients. If `folder` holds a complete checkpoint, go on from the last one.

    A training that was killed and goes on ends with the same bits as one that was not killed.

    Args:
        model: in the state that the training begins in.
        data: a data set.
        collate: from a list of its items to a batch.
        recipe: how long and how fast.
        folder: for checkpoints.
        seed: of the order of the data and of dropout.
        heads: names of the parameters that have the heads' learning rate.
        penalty: a term that is added to the loss of every step.
        gated: options of `GatedTrainer`, where gates are searched.

    Returns:
        The seconds that it took.

    Raises:
        TrainingError: the launcher uses several devices in one process, FSDP or DeepSpeed; or the loss is not finite.
    """
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=round(recipe.warmup * recipe.steps),
        weight_decay=recipe.weight_decay,
        bf16=recipe.bf16,
        use_cpu=recipe.use_cpu,
        seed=seed,
        logging_steps=max(1, recipe.steps // 10),
        save_strategy="no" if recipe.checkpoint_steps is None else "steps",
        save_steps=recipe.checkpoint_steps or 1,
        save_total_limit=2,  # the newest may not be complete yet; the one before it is
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    options: dict[str, Any] = {
        "train_dataset": data,
        "data_collator": collate,
        "callbacks": [_MarkComplete()],
    }
    check_launch(args)
    model.train()
    trainer: _StageTraining = (
        StageTrainer(model, args, **options) if gated is None else GatedStageTrainer(model, args, **options, **gated)
    )
    trainer.penalty = penalty
    trainer.heads = tuple(model.get_parameter(name) for name in heads)
    trainer.head_rate = recipe.head_learning_rate
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    last = _last_checkpoint(folder)
    if last is not None and _steps_of(last) >= recipe.steps:  # the Trainer would take one step more
        trainer._load_from_checkpoint(str(last))
        trainer.state = TrainerState.load_from_json(str(last / TRAINER_STATE_NAME))
        if isinstance(trainer, GatedTrainer):
            trainer.describe_training()
    else:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    seconds = time.perf_counter() - start
    if trainer.optimizer is not None:
        trainer.optimizer.state.clear()  # a Trainer is freed late: its reference cycles await the garbage collector
    return seconds


def phase_seed(seed: int, phase: str) -> int:
    """The seed of one phase of a stream.

    Args:
        seed: of the stream.
        phase: what the seed is for, with the name of the task. The strategy and the order of tasks play no part.
    """
    return zlib.crc32(f"{seed} {phase}".encode()) & 0x7FFFFFFF


def _last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None; checkpoints that were not written to their end are removed."""
    complete = {}
    for path in folder.glob("checkpoint-*"):
        if (path / COMPLETE).exists():
            complete[_steps_of(path)] = path
        else:
            shutil.rmtree(path)
    return complete[max(complete)] if complete else None


def _steps_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
