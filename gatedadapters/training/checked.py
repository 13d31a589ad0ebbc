"""What every Trainer here refuses: a loss that is no number, labels that no head has, and a foreign checkpoint."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from gatedadapters.errors import TaskError, TrainingError


class CheckedTrainer(Trainer):
    """transformers' Trainer, which looks at each training loss, and at a checkpoint before anything of it is loaded."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task loss.

        Raises:
            TrainingError: it is not finite, while training.
            TaskError: a label lies outside the head.
        """
        try:
            loss, outputs = cast(tuple[Tensor, Any], super().compute_loss(model, inputs, True, num_items_in_batch))
        except IndexError as error:
            if "Target" not in str(error):
                raise
            width = getattr(getattr(self.model, "config", None), "num_labels", None)
            raise TaskError(
                "a label lies outside the head",
                expected="a label below the number of classes" if width is None else f"0..{width - 1}", got=error,
                where=f"optimiser step {self.state.global_step}",
                fix="check the label column and the model's num_labels",
            ) from error  # fmt: skip
        if model.training and not bool(torch.isfinite(loss).all()):
            raise TrainingError(
                "the loss is not finite",
                expected="a finite loss",
                got=str(float(loss.detach().mean())),
                where=f"optimiser step {self.state.global_step}",
                fix="lower the learning rate, clip gradients, or look for broken examples near this step",
            )
        return (loss, outputs) if return_outputs else loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._check_checkpoint(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        self._check_checkpoint(str(self.state.best_model_checkpoint))
        super()._load_best_model()

    @abstractmethod
    def _check_checkpoint(self, folder: str) -> None:
        """Refuse, before anything is changed, a checkpoint of something else than what is trained."""
