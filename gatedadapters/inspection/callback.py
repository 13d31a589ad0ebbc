"""A Trainer callback that writes gates, structures and masks to TensorBoard."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from gatedadapters.config import L0, Budget, Schedule
from gatedadapters.config.base import Config
from gatedadapters.errors import AttachError
from gatedadapters.inspection.tensorboard import TensorBoardWriter
from gatedadapters.masking.delta import find_delta
from gatedadapters.structure import Structure
from gatedadapters.supernet.adapters import Adapters, get_adapters


class TensorBoardInspector(TensorBoardCallback):
    """transformers' TensorBoard callback, which also writes gates, structures and masks into the same run.

    Use it instead of the built-in callback: `TrainingArguments(report_to="none")` and
    `GatedTrainer(callbacks=[TensorBoardInspector("runs/search")])`. It writes

    - hyper-parameters and the mask at the beginning,
    - the gates while they learn,
    - the structure at the prune, at every checkpoint where it has changed, and at the end, with the changes since the
      last one,
    - `time/step`, the seconds of a training step.

    Args:
        log_dir: folder of the run; default: that of transformers.
        hparams: hyper-parameters of the run, see `TensorBoardWriter.hparams`; default: `run_hparams`.
        metrics: tags of scalars by which runs are compared, beside the loss and the size. You write their values.
        max_tags: see `TensorBoardWriter`.
        writes: how often gates are written while they learn, at most.
        maps: how often gates are drawn, at most.
        share: largest share of the training time for the writes while gates learn. Writes that would exceed it are
            skipped, except those at the beginning, at the prune and at the end.

    Attributes:
        seconds: time spent on writing.
    """

    def __init__(
        self,
        log_dir: str | Path | None = None,
        *,
        hparams: Config | Mapping[str, Any] | None = None,
        metrics: Sequence[str] = (),
        max_tags: int = 600,
        writes: int = 60,
        maps: int = 12,
        share: float = 0.01,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if log_dir is not None:
            self.logging_dir = str(log_dir)
        self.hparams, self.metrics = hparams, tuple(metrics)
        self.max_tags, self.writes, self.maps, self.share = max_tags, writes, maps, share
        self.writer: TensorBoardWriter | None = None
        self.adapters: Adapters | None = None
        self.seconds = 0.0  # spent on writing
        self._shown: Structure | None = None
        self._began = self._fixed_seconds = self._step_began = self._step_seconds = 0.0
        self._steps, self._next, self._next_map, self._was_fixed = 0, 0, 0, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the run."""
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if not state.is_world_process_zero or self.tb_writer is None:
            return
        model, self._began, self.seconds = kwargs["model"], time.perf_counter(), 0.0
        self.writer = TensorBoardWriter(self.tb_writer, max_tags=self.max_tags)
        self.adapters, self._shown = adapters_or_none(model), None
        self._steps, self._next, self._next_map, self._was_fixed = 0, 0, 0, self._is_fixed()
        delta = find_delta(model)
        with self._counted():
            found = self.hparams or run_hparams(args, state, self.adapters, kwargs.get("optimizer"))
            size = ("structure/params",) if self.adapters is not None else ()
            self.writer.hparams(found, dict.fromkeys((*self.metrics, "train/loss", *size)))
            if delta is not None:
                self.writer.mask(delta.mask, state.global_step)
        self._gates(state)
        self._fixed_seconds = self.seconds

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._step_began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write gates while they learn, and the structure once it is fixed."""
        self._step_seconds += time.perf_counter() - self._step_began
        self._steps += 1
        if self.writer is None:
            return
        if self._is_fixed():
            if not self._was_fixed:
                self._was_fixed = True
                self._gates(state, fully=True)
                self._structure(state.global_step)
        elif state.global_step >= self._next and self._affordable(state):
            self._gates(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the Trainer's values and the seconds of a step."""
        logs = {key: value for key, value in (logs or {}).items() if not key.startswith("gates/")}
        super().on_log(args, state, control, logs=logs, **kwargs)  # type: ignore[no-untyped-call]
        if self.writer is not None and self._steps:
            self.writer.scalars({"time/step": self._step_seconds / self._steps}, state.global_step)
            self._step_seconds, self._steps = 0.0, 0

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the structure of a checkpoint."""
        if self._affordable(state):
            self._structure(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the gates and the structure a last time, and close the run."""
        self._gates(state, fully=True)
        self._structure(state.global_step)
        self.writer = self.adapters = self._shown = None
        super().on_train_end(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    # -- inside --------------------------------------------------------------------------------------------------------

    def _is_fixed(self) -> bool:
        bank = self.adapters.bank if self.adapters is not None else None
        return bank is None or bank.frozen

    def _gates(self, state: TrainerState, *, fully: bool = False) -> None:
        if self.writer is None or self.adapters is None:
            return
        step = state.global_step
        maps = fully or step >= self._next_map
        with self._counted():
            self.writer.gates(self.adapters, step, maps=maps)
        searching = self._searching(state)
        self._next = step + max(1, searching // self.writes)
        if maps:
            self._next_map = step + max(1, searching // self.maps)

    def _structure(self, step: int) -> None:
        """Write the structure if it differs from the one written last."""
        if self.writer is None or self.adapters is None:
            return
        with self._counted():
            structure = self.adapters.structure or self.adapters.discretize()
            before = self._shown
            if before is None or before.diff(structure):
                self.writer.structure(structure, step, before=before)
            self._shown = structure

    def _searching(self, state: TrainerState) -> int:
        """Number of steps in which gates learn."""
        pressure = self.adapters.pressure if self.adapters is not None else None
        prune = pressure.schedule.prune if pressure is not None else None
        return math.ceil((1.0 if prune is None else prune) * state.max_steps)

    def _affordable(self, state: TrainerState) -> bool:
        """Whether writing stays within its share of the training time, which is estimated from the pace so far."""
        elapsed, step = time.perf_counter() - self._began - self.seconds, max(1, state.global_step)
        due = min(1.0, step / self._searching(state))
        return self.seconds - self._fixed_seconds <= self.share * elapsed * state.max_steps / step * due

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """A context whose time counts as time for writing."""
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


def run_hparams(
    args: TrainingArguments, state: TrainerState, adapters: Adapters | None, optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    """Hyper-parameters of a run, as far as the Trainer shows them.

    Every run has the same names; a value that does not apply is None.
    """
    gates = {id(gate) for gate in adapters.gate_parameters()} if adapters is not None else set()
    groups = optimizer.param_groups if optimizer is not None else []
    rates = [group["lr"] for group in groups if any(id(p) in gates for p in group["params"])]
    pressure = adapters.pressure if adapters is not None else None
    bank = adapters.bank if adapters is not None else None
    penalty = pressure.penalty if pressure is not None else None
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "model": adapters.identity.model_class if adapters is not None else None,
        "space": adapters.space.name if adapters is not None else None,
        "tasks": ", ".join(adapters.tasks) if adapters is not None else None,
        "gate levels": ", ".join(bank.config.levels) if bank is not None else None,
        "penalty": type(penalty).__name__ if penalty is not None else None,
        **{name: getattr(penalty, name, None) for name in sorted(L0.model_fields | Budget.model_fields)},
        **{name: getattr(pressure.schedule, name) if pressure else None for name in Schedule.model_fields},
        "gate learning rate": rates[0] if rates else None,
        "learning rate": args.learning_rate,
        "learning rate schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "weight decay": args.weight_decay,
        "batch": batch,
        "steps": state.max_steps,
        "seed": args.seed,
    }


def adapters_or_none(model: nn.Module) -> Adapters | None:
    """The adapters of a model, or None."""
    try:
        return get_adapters(model)
    except AttachError:
        return None
