"""From a configuration to the arguments of transformers' Trainer."""

from __future__ import annotations

import inspect
import time
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from gatedadapters.config import SearchConfig, TrainingConfig, TuningConfig
from gatedadapters.data import task_sampler
from gatedadapters.training.devices import on_cpu


def training_arguments(
    training: TrainingConfig | TuningConfig, scratch: str, *, bf16: bool, logs: int
) -> TrainingArguments:
    """The Trainer's arguments for one training of a run: no checkpoints, and nothing printed.

    Args:
        training: the configuration of the training.
        scratch: a folder that the Trainer may write to.
        bf16: whether to train under bf16 autocast.
        logs: number of log entries, which are spread evenly over the steps.

    Raises:
        ConfigError: a GPU is configured and there is none.
    """
    return TrainingArguments(
        output_dir=scratch,
        max_steps=training.steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(training.warmup * training.steps),
        weight_decay=training.weight_decay,
        bf16=bf16,
        use_cpu=on_cpu(training.device),
        seed=training.seed,
        logging_steps=max(1, training.steps // logs),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def use_bf16(config: SearchConfig) -> bool:
    """Whether to train under bf16 autocast.

    With `precision: auto`, a CPU is timed for some milliseconds, and uses bf16 if that multiplies at least 1.3 times as
    fast. A GPU uses bf16 if it supports it.
    """
    training = config.training
    if training.precision != "auto":
        return training.precision == "bf16"
    if on_cpu(training.device):
        return 1.3 * _matmul_seconds(torch.bfloat16) < _matmul_seconds(torch.float32)
    return torch.cuda.is_available() and bool(torch.cuda.is_bf16_supported())


def _matmul_seconds(dtype: torch.dtype) -> float:
    """The fastest of five matrix products of the size of a small feed-forward layer, in seconds."""
    x, weight = torch.ones(512, 384, dtype=dtype), torch.ones(384, 1536, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        x @ weight
        times.append(time.perf_counter() - start)
    return min(times)


class MixedTaskTrainer(Trainer):
    """transformers' Trainer with temperature sampling across tasks, for models without adapters."""

    def __init__(self, *args: Any, task_temperature: float, **kwargs: Any) -> None:
        self.task_temperature = task_temperature
        super().__init__(*args, **kwargs)
        self._reads_task_ids = "task_ids" in inspect.signature(cast(Any, self.model).forward).parameters

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The loss of the task. A model without heads has no use for `task_ids`."""
        if not self._reads_task_ids:
            inputs = {name: value for name, value in inputs.items() if name != "task_ids"}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sizes = (train_dataset if train_dataset is not None else cast(Any, self.train_dataset)).sizes
        return task_sampler(
            sizes,
            temperature=self.task_temperature,
            batch_size=self.args.train_batch_size,
            num_samples=sum(sizes),
            seed=self.args.seed,
        )
