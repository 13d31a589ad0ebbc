"""Which task each example of a batch belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gatedadapters.errors import TaskError


def checked_ids(models: Sequence[nn.Module], tasks: Sequence[str], task_ids: Tensor, batch: int | None) -> Tensor:
    """Each example's position in `tasks`, (batch,), from the task ids of a call.

    Args:
        models: the model, or nothing. If the model itself has tasks of these names (`MultiTaskClassifier`), the ids
        count
            the model's tasks; otherwise they count `tasks`.
        tasks: names of the adapters' tasks.
        task_ids: integers (batch,).
        batch: number of examples, None if unknown.

    Raises:
        TaskError: not one integer per example, or an id of a task that the adapters do not have.
    """
    is_tensor = isinstance(task_ids, Tensor)
    fits = is_tensor and task_ids.dim() == 1 and not task_ids.is_floating_point() and len(task_ids) > 0
    if not fits or batch not in (None, len(task_ids)):
        raise TaskError(
            "task ids do not match the batch",
            expected=f"integer task ids of shape ({'batch' if batch is None else batch},)",
            got=f"{task_ids.dtype} {tuple(task_ids.shape)}" if is_tensor else repr(task_ids),
            where="task_ids",
            fix="pass one id per example",
        )
    known = getattr(models[0], "tasks", None) if models else None
    own = tuple(range(len(tasks)))
    if isinstance(known, tuple) and set(tasks) <= set(known):
        own = tuple(map(known.index, tasks))
    low, high = (int(v) for v in torch.aminmax(task_ids))
    if own == tuple(range(len(tasks))):
        if low >= 0 and high < len(tasks):
            return task_ids
    else:
        found = task_ids[:, None] == torch.tensor(own, device=task_ids.device)
        if bool(found.any(1).all()):
            return found.int().argmax(1)
    offered = f"0..{len(own) - 1}" if own == tuple(range(len(own))) else ", ".join(map(str, own))
    raise TaskError(
        "a task id names none of the tasks that are attached",
        expected=f"task ids in {offered} ({', '.join(tasks)})",
        got=f"{low}..{high}",
        where="task_ids",
        fix="attach with all tasks, in the order the ids count them",
    )
