"""transformers' Trainer for gated models."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from gatedadapters.adapters import NAME, get_adapters
from gatedadapters.config import Budget, Penalty, Schedule
from gatedadapters.data import task_sampler
from gatedadapters.errors import TrainingError


class ConstantFactor:
    """A learning-rate factor that stays 1: gates keep their rate until the Structure is fixed."""

    def __call__(self, step: int) -> float:
        """1 at every step."""
        return 1.0


class GatedTrainer(Trainer):
    """Trains a model that `attach` prepared; everything of transformers' Trainer applies.

    Added: the penalty in the loss (once per optimiser step, however many micro-batches), a learning rate for gates and no
    decay on them, the schedule (warm-up, ramp, prune) from the number of steps the Trainer works out, checkpoints that
    hold only what is trained, and temperature sampling across tasks.

    To see gates in TensorBoard, replace the built-in callback: `TrainingArguments(report_to="none")` and
    `callbacks=[gatedadapters.inspection.TensorBoardInspector(folder)]`.

    Args:
        model: with adapters attached.
        args: transformers' TrainingArguments.
        budget, penalty: what holds the adapter small; give one, or neither where `attach` was given a penalty or a
            Structure.
        schedule: see `Schedule`.
        gate_learning_rate: default: a gate can cross its range within the ramp.
        task_temperature: sample across tasks with probability n ** (1 / temperature); needs a data set with `sizes`.
        **kwargs: transformers' Trainer's.

    Raises:
        AttachError: the model has no adapters.
        TrainingError: both a budget and a penalty are given, or the arguments cannot give a correct result.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        budget: Budget | None = None,
        penalty: Penalty | None = None,
        schedule: Schedule | None = None,
        gate_learning_rate: float | None = None,
        task_temperature: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.adapters = get_adapters(model)
        if budget is not None and penalty is not None:
            raise TrainingError(expected="budget= or penalty=", got="both", where="GatedTrainer", fix="drop one")
        chosen = budget if budget is not None else penalty
        if chosen is not None:
            self.adapters.set_penalty(chosen, schedule=schedule, total_steps=max(1, args.max_steps))
        self.gate_learning_rate, self.task_temperature = gate_learning_rate, task_temperature
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True  # closed paths take no part in a step
        super().__init__(model=model, args=args, **kwargs)
        self._gate_group: int | None = None

    # -- optimiser and schedule ----------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, with the gates in a group of their own."""
        if self.optimizer is not None:
            return self.optimizer
        gates = [p for p in self.adapters.gate_parameters() if p.requires_grad]
        for gate in gates:
            gate.requires_grad_(False)
        optimizer = super().create_optimizer(model)
        for gate in gates:
            gate.requires_grad_(True)
        if gates:
            self._gate_group = len(optimizer.param_groups)
            optimizer.add_param_group({"params": gates, "lr": self.gate_learning_rate or 0.0, "weight_decay": 0.0})
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The Trainer's schedule for weights, a constant rate for gates; the pressure learns how long training is."""
        pressure = self.adapters.pressure
        if pressure is not None:
            pressure.total_steps = num_training_steps
        if self._gate_group is not None and self.lr_scheduler is None:
            group = (optimizer or self.optimizer).param_groups[self._gate_group]
            if self.gate_learning_rate is None:
                schedule = pressure.schedule if pressure is not None else Schedule()
                group["lr"] = default_gate_rate(schedule, num_training_steps)
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if self._gate_group is not None and isinstance(scheduler, LambdaLR):
            scheduler.lr_lambdas[self._gate_group] = ConstantFactor()
            group = (optimizer or self.optimizer).param_groups[self._gate_group]
            group["lr"] = scheduler.base_lrs[self._gate_group]
        return scheduler

    # -- loss ----------------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Task loss plus penalty while training; the task loss alone in evaluation.

        Raises:
            TrainingError: the loss is not finite.
        """
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if not model.training:
            return result
        if not bool(torch.isfinite(loss).all()):
            raise TrainingError(
                "the loss is not finite",
                expected="a finite loss",
                got=str(float(loss.detach().mean())),
                where=f"optimiser step {self.state.global_step}",
                fix="lower the learning rate, clip gradients, or look for broken examples near this step",
            )
        if self.adapters.pressure is not None and self.adapters.bank is not None:
            penalty = self.adapters.penalty() / self._micro_batches_to_come(num_items_in_batch)
            # the penalty's gradient without its value: the loss logged stays the task's, comparable to evaluation's
            loss = loss + (penalty - penalty.detach())
        return (loss, result[1]) if return_outputs else loss

    def _micro_batches_to_come(self, num_items_in_batch: Tensor | int | None) -> int:
        """By how much the penalty must be divided here, so that its sum over micro-batches is one penalty.

        A loss normalised over the whole accumulated batch is added up as it is; otherwise the Trainer divides by the
        number of micro-batches itself, after this.
        """
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None
        return int(self.current_gradient_accumulation_steps) if scaled else 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the state of the gates to every training log."""
        if "loss" in logs:
            logs.update(gate_scalars(self.adapters))
        super().log(logs, start_time)

    # -- data ----------------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        first = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if first and self._signature_columns is not None:
            self._signature_columns.append("task_ids")  # consumed by the hook before the model's own forward

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if self.task_temperature is None:
            return super()._get_train_sampler(train_dataset)
        sizes = getattr(dataset, "sizes", None)
        if sizes is None:
            raise TrainingError(
                expected="a data set with `sizes` (examples per task)",
                got=type(dataset).__name__,
                where="task_temperature",
                fix="use gatedadapters.data.MixedTaskDataset",
            )
        return task_sampler(
            sizes,
            temperature=self.task_temperature,
            batch_size=self.args.train_batch_size,
            num_samples=sum(sizes),
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Only what is trained: adapters, gates and heads. The backbone is the user's and never changes."""
        folder = output_dir if output_dir is not None else self.args.output_dir
        if not self.args.should_save:
            return
        os.makedirs(folder, exist_ok=True)
        state = state_dict if state_dict is not None else self.accelerator.unwrap_model(self.model).state_dict()
        trained = {k: v.detach().contiguous().cpu() for k, v in state.items() if self._is_trained(k)}
        part = os.path.join(folder, f"{SAFE_WEIGHTS_NAME}.part")
        save_file(trained, part, metadata={"format": "pt"})
        os.replace(part, os.path.join(folder, SAFE_WEIGHTS_NAME))
        torch.save(self.args, os.path.join(folder, "training_args.bin"))
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _is_trained(self, key: str) -> bool:
        return key.startswith(f"{NAME}.") or key in self.adapters.head_names

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """The backbone's keys are absent by design; anything else missing or unexpected is an error."""
        missing = [key for key in load_result.missing_keys if self._is_trained(key)]
        if missing or load_result.unexpected_keys:
            raise TrainingError(
                "this checkpoint is of other adapters",
                expected="the keys of the attached adapters",
                got=f"missing {missing[:3]}, unexpected {load_result.unexpected_keys[:3]}",
                where="resume_from_checkpoint",
                fix="attach with the search space, tasks and heads the checkpoint was made with",
            )


def default_gate_rate(schedule: Schedule, total_steps: int) -> float:
    """A rate at which Adam's steps cross the useful range of log alpha (about 8) within the ramp, in [0.01, 0.3]."""
    ramp = max(1.0, (schedule.ramp - schedule.warmup) * total_steps)
    return min(0.3, max(0.01, 8.0 / ramp))


@torch.no_grad()
def gate_scalars(adapters: Any) -> Mapping[str, float]:
    """What to watch of the gates: cheap, one host read each."""
    bank, pressure = adapters.bank, adapters.pressure
    if bank is None:
        return {}
    bank.refresh()
    scalars = {
        "gates/expected_params": float(bank.expected_cost()),
        "gates/open_paths": sum(bank.open_paths.values()) / len(bank.open_paths),
    }
    if pressure is not None:
        scalars["gates/penalty"] = float(pressure.term(bank))
        if isinstance(pressure.penalty, Budget):
            scalars["gates/target"] = pressure.target(bank)
            scalars["gates/multiplier"] = float(pressure.multipliers[0])
    return scalars
