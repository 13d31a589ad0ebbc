"""Checks a stream before anything is computed or written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gatedadapters.config import StreamTrainingConfig
from gatedadapters.continual.stage import StreamSetup
from gatedadapters.continual.strategies import Strategy, resolve
from gatedadapters.continual.tasks import Task, TaskStream, first_example
from gatedadapters.continual.tensors import tensors_of
from gatedadapters.errors import AttachError, ConfigError
from gatedadapters.masking.delta import find_delta
from gatedadapters.supernet.attach import check_no_adapters, find_heads
from gatedadapters.training.devices import on_cpu


def check_stream(
    model: nn.Module,
    tasks: TaskStream | Sequence[Task],
    strategy: str | Mapping[str, Any] | Strategy = "l2_fisher",
    *,
    training: StreamTrainingConfig | None = None,
) -> StreamSetup:
    """Check that a model, tasks, a strategy and a training go together, as `run_stream` does first.

    Nothing is trained or written, and the model is left as it is; one example runs through it.

    Args:
        model: see `run_stream`, as all other arguments.
        tasks: in the order they come.
        strategy: a name, its options with the name as `kind`, or a `Strategy`.
        training: how long and how fast each task is tuned.

    Returns:
        What strategies see of the stream in every stage.

    Raises:
        TaskError, DataError: tasks that do not suit each other, the model or the strategy.
        ConfigError: unknown or unsuitable options, a device that is not there, or several processes.
        AttachError: the model has adapters or a sparse delta, or lacks a task's head.
        MaskError, ArtifactError: see `Strategy.check` of the strategy.
    """
    stream = tasks if isinstance(tasks, TaskStream) else TaskStream(tasks)
    chosen, training = resolve(strategy), training or StreamTrainingConfig()
    on_cpu(training.device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            "a stream is run by one process",
            expected="WORLD_SIZE 1",
            got=os.environ["WORLD_SIZE"],
            where="run_stream",
            fix="start it without torchrun; several streams may run side by side",
        )
    if find_delta(model) is not None:
        raise AttachError(
            "a stream starts from a plain model",
            expected="no sparse delta",
            got="model.sparse_delta",
            where="run_stream",
            fix="remove or merge it first",
        )
    check_no_adapters(model)
    heads = stream.check(model)
    others = find_heads(model, None) if any(task.classes for task in stream) else ()
    all_heads = frozenset(name for names in (*heads, others) for name in names)
    sample = first_example(model, stream[0])
    setup = StreamSetup(model, stream, training, heads, all_heads, tensors_of(model, all_heads, sample), sample)
    chosen.check(setup)
    return setup
