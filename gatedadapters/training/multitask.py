"""A classifier of several tasks: one encoder, one head per task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from gatedadapters.errors import TaskError


class MultiTaskClassifier(nn.Module):
    """A transformers encoder with a linear head per task; each example of a mixed batch goes to the head of its task.

    Args:
        backbone: returns `last_hidden_state` (batch, length, hidden).
        classes: number of classes by task name; the order gives the task ids.
        pooling: `mean` over unmasked positions, or the `first` position.
        dropout: probability, before the heads.

    Raises:
        TaskError: there is no task, or one has fewer than 2 classes.
    """

    base_model_prefix = "backbone"  # parameters outside it belong to heads, which are trained and saved
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch; the Trainer divides it by the micro-batches

    def __init__(
        self,
        backbone: PreTrainedModel,
        classes: Mapping[str, int],
        *,
        pooling: Literal["mean", "first"] = "mean",
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        few = {name: n for name, n in classes.items() if n < 2}
        if few or not classes:
            raise TaskError(
                "there is nothing to classify",
                expected="tasks with at least 2 classes each",
                got=repr(few or dict(classes)),
                where="MultiTaskClassifier(classes=)",
                fix="give the number of classes by task, and leave out tasks with one class",
            )
        self.backbone, self.config = backbone, backbone.config
        self.tasks, self.pooling = tuple(classes), pooling
        self.dropout = nn.Dropout(dropout)
        self.widths = list(classes.values())
        self.heads = nn.ModuleDict()
        for name, width in classes.items():
            head = nn.Linear(backbone.config.hidden_size, width)
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.heads[_module_name(name, self.heads)] = head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify a mixed batch.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length), 1 where there is a token.
            task_ids: (batch,); optional if there is one task.
            labels: (batch,), each below its own task's number of classes.
            **kwargs: the backbone's.

        Returns:
            `logits` (batch, largest number of classes), padded with the minimum of the dtype for tasks with fewer;
            `loss`, the mean cross-entropy over the examples, or None without labels.

        Raises:
            TaskError: there are several tasks and no task ids, a task id is unknown, or a label lies outside its head.
        """
        pooled = self.pooled(input_ids, attention_mask, **kwargs)
        if task_ids is None:
            if len(self.tasks) > 1:
                raise TaskError(
                    "this model holds several tasks, and the call does not say which",
                    expected=f"task_ids (batch,) in 0..{len(self.tasks) - 1}",
                    got="none",
                    where="MultiTaskClassifier",
                    fix="pass task_ids",
                )
            task_ids = torch.zeros(len(pooled), dtype=torch.long, device=pooled.device)
        pooled = self.dropout(pooled)
        floor = torch.finfo(pooled.dtype).min
        logits = pooled.new_full((len(pooled), max(self.widths)), floor)
        unclaimed = len(pooled)
        for index, head in enumerate(self.heads.values()):
            rows = (task_ids == index).nonzero().flatten()
            unclaimed -= len(rows)
            if len(rows):
                own = next((t.dtype for t in (*head.parameters(), *head.buffers())), pooled.dtype)
                part = head(pooled[rows].to(own)).to(logits.dtype)  # the backbone may compute in bf16
                logits = logits.index_copy(0, rows, F.pad(part, (0, logits.shape[1] - part.shape[1]), value=floor))
        if unclaimed:
            raise TaskError(
                "task ids do not match the batch",
                expected=f"one task id among 0..{len(self.tasks) - 1} for each of {len(pooled)} examples",
                got=f"{tuple(task_ids.shape)} ids, {unclaimed} examples without a task",
                where="MultiTaskClassifier",
                fix="count tasks in the order of `classes`",
            )
        loss = None
        if labels is not None:
            self._check_labels(labels, task_ids)
            loss = F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def pooled(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The input of the heads, (batch, hidden): the backbone's hidden states, pooled over positions."""
        output = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden, mask = output.last_hidden_state, attention_mask
        if self.pooling == "first":
            return cast(Tensor, hidden[:, 0])
        if mask is None:
            return cast(Tensor, hidden.mean(1))
        weight = mask.to(hidden.dtype)[..., None]
        return cast(Tensor, (hidden * weight).sum(1) / weight.sum(1).clamp(min=1))

    def _check_labels(self, labels: Tensor, task_ids: Tensor) -> None:
        limits = torch.tensor(self.widths, device=labels.device)[task_ids]
        wrong = ((labels < 0) | (labels >= limits)).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            task = int(task_ids[row])
            raise TaskError(
                "a label lies outside the head",
                expected=f"0..{self.widths[task] - 1}",
                got=str(int(labels[row])),
                where=f"task {self.tasks[task]!r}, row {row} of the batch",
                fix="check the label column and the class list",
            )

    def get_input_embeddings(self) -> nn.Module:
        """The token embeddings of the backbone."""
        embedding: nn.Module = self.backbone.get_input_embeddings()
        return embedding

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Enable checkpointing in the backbone; newer releases of transformers call this name."""
        self.backbone.activation_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_disable(self) -> None:
        """Disable checkpointing in the backbone."""
        self.backbone.activation_checkpointing_disable()

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Enable checkpointing in the backbone; older releases of transformers call this name."""
        self.backbone.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Disable checkpointing in the backbone."""
        self.backbone.gradient_checkpointing_disable()


def _module_name(task: str, taken: nn.ModuleDict) -> str:
    """A key for a task's head in `taken`: it has no dots, and is not an attribute of a ModuleDict (such as "type")."""
    name = task.replace(".", "_") or "_"
    while hasattr(taken, name):
        name += "_"
    return name
