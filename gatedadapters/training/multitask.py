"""A classifier of several tasks: one encoder, one head per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any, ClassVar, Literal, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from gatedadapters.errors import TaskError
from gatedadapters.runtime.sharding import replicate
from gatedadapters.supernet.supernet import NAME

_OF_THE_BACKBONE = frozenset(
    ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
)


class MultiTaskConfig(PreTrainedConfig):
    """The configuration of a `MultiTaskClassifier`, as `save_pretrained` writes it.

    `hidden_size`, `vocab_size` and the like are those of the backbone.

    Attributes:
        backbone: the configuration of the backbone.
        backbone_class: name of the backbone's class in transformers; empty takes what `AutoModel` builds.
        tasks: names of the tasks; their order gives the task ids.
        labels: names of the classes of each task, in the order of its outputs.
        pooling: `mean` over unmasked positions, or the `first` position.
        dropout: probability, before the heads.
        task: the task of every example of a call that carries no `task_ids`. `id2label` holds its classes.
    """

    model_type: ClassVar[str] = "gatedadapters_multitask"
    sub_configs: ClassVar[dict[str, Any]] = {"backbone": AutoConfig}

    backbone: PreTrainedConfig | dict[str, Any] | None = None
    backbone_class: str = ""
    tasks: list[str] = field(default_factory=list)
    labels: list[list[str]] = field(default_factory=list)
    pooling: Literal["mean", "first"] = "mean"
    dropout: float = 0.1
    task: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Build the backbone's configuration, where a file gave it as a dictionary."""
        backbone = AutoConfig.for_model(**self.backbone) if isinstance(self.backbone, dict) else self.backbone
        self.backbone = None  # transformers would set its attention back to the default
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        self.backbone = backbone

    def __getattr__(self, name: str) -> Any:
        backbone = self.__dict__.get("backbone")
        if name in _OF_THE_BACKBONE and isinstance(backbone, PreTrainedConfig):
            return getattr(backbone, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The configuration of the part that reads text: the backbone's."""
        if isinstance(self.backbone, PreTrainedConfig):
            return self.backbone.get_text_config(*args, **kwargs)
        return self


class MultiTaskClassifier(PreTrainedModel):
    """A transformers encoder with a linear head per task; each example of a mixed batch goes to the head of its task.

    `save_pretrained`, `from_pretrained` and transformers' text-classification pipeline work as with any classifier.
    Where there are several tasks, `set_task(name)` says which one a call without `task_ids` means.

    Args:
        backbone: returns `last_hidden_state` (batch, length, hidden). A `MultiTaskConfig` in its place builds a
            classifier with new weights.
        classes: by task name, the number of classes or their names; the order gives the task ids.
        pooling: `mean` over unmasked positions, or the `first` position.
        dropout: probability, before the heads.

    Raises:
        TaskError: there is no task, or one has fewer than 2 classes.
    """

    config_class = MultiTaskConfig
    base_model_prefix = "backbone"  # parameters outside it belong to heads, which are trained and saved
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # whether it does is the backbone's to say
    _supports_attention_backend = True
    accepts_loss_kwargs = False  # the loss is a mean over the batch; the Trainer divides it by the micro-batches

    def __init__(
        self,
        backbone: PreTrainedModel | MultiTaskConfig,
        classes: Mapping[str, int | Sequence[str]] | None = None,
        *,
        pooling: Literal["mean", "first"] = "mean",
        dropout: float = 0.1,
    ) -> None:
        config = (
            backbone if isinstance(backbone, MultiTaskConfig) else _config(backbone, classes or {}, pooling, dropout)
        )
        named = dict(zip(config.tasks, config.labels, strict=True))
        few = {name: len(labels) for name, labels in named.items() if len(labels) < 2}
        if few or not named:
            raise TaskError(
                "there is nothing to classify",
                expected="tasks with at least 2 classes each",
                got=repr(few or dict(classes or {})),
                where="MultiTaskClassifier(classes=)",
                fix="give the number of classes by task, and leave out tasks with one class",
            )
        super().__init__(config)
        self.backbone = _new_backbone(config) if isinstance(backbone, MultiTaskConfig) else backbone
        self.tasks, self.pooling = tuple(named), config.pooling
        self.dropout = nn.Dropout(config.dropout)
        self.widths = [len(labels) for labels in named.values()]
        self.heads = nn.ModuleDict()
        for name, width in zip(self.tasks, self.widths, strict=True):
            head = nn.Linear(config.hidden_size, width)
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.heads[_module_name(name, self.heads)] = head
        replicate(self.heads)  # a batch on one process may hold other tasks than one on another
        self.task = config.task
        self.post_init()  # type: ignore[no-untyped-call]

    def init_weights(self) -> None:
        """Tie the backbone's weights. The backbone has initialised itself, and the heads are new."""
        self.tie_weights()

    @property
    def task(self) -> str | None:
        """The task of every example of a call that carries no `task_ids`; None if the call must say it."""
        return cast("str | None", self.config.task)

    @task.setter
    def task(self, name: str | None) -> None:
        config = self.config
        config.task = name
        shown = name if name is not None else self.tasks[0] if len(self.tasks) == 1 else None
        labels = _numbered(max(self.widths)) if shown is None else self.labels[shown]
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}

    @property
    def labels(self) -> dict[str, tuple[str, ...]]:
        """Names of the classes by task, in the order of the task's outputs."""
        return {name: tuple(labels) for name, labels in zip(self.config.tasks, self.config.labels, strict=True)}

    def set_task(self, name: str | None) -> None:
        """Use one task for every example of a call that carries no `task_ids`, in attached adapters too.

        `config.id2label`, which pipelines read, then names this task's classes. None takes it back.

        Raises:
            TaskError: there is no such task.
        """
        if name is not None and name not in self.tasks:
            raise TaskError(
                "no such task",
                expected=f"one of {', '.join(self.tasks)}",
                got=repr(name),
                where="MultiTaskClassifier.set_task",
                fix="name a task",
            )
        adapters: Any = getattr(self, NAME, None)
        adapters = getattr(adapters, "current", adapters)  # of a shelf, the active ones
        if adapters is not None and len(adapters.tasks) > 1 and (name is None or name in adapters.tasks):
            adapters.set_task(name)
        self.task = name

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
            task_ids: (batch,); optional if there is one task, or one is set.
            labels: (batch,), each below its own task's number of classes.
            **kwargs: the backbone's.

        Returns:
            `logits` (batch, largest number of classes), padded with the minimum of the dtype for tasks with fewer;
            without `task_ids` as wide as the task that is set. `loss`, the mean cross-entropy over the examples, or
            None without labels.

        Raises:
            TaskError: there are several tasks and no task ids, a task id is unknown, or a label lies outside its head.
        """
        pooled = self.dropout(self.pooled(input_ids, attention_mask, **kwargs))
        floor = torch.finfo(pooled.dtype).min
        width = max(self.widths)
        if task_ids is None:
            index = self._task_of_call()
            width = self.widths[index]
            task_ids = torch.full((len(pooled),), index, dtype=torch.long, device=pooled.device)
        logits = pooled.new_full((len(pooled), width), floor)
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

    def _task_of_call(self) -> int:
        """The position of the task that a call without `task_ids` means."""
        if len(self.tasks) == 1:
            return 0
        if self.task is None:
            raise TaskError(
                "this model holds several tasks, and the call does not say which",
                expected=f"task_ids (batch,) in 0..{len(self.tasks) - 1} ({', '.join(self.tasks)})",
                got="none",
                where="MultiTaskClassifier",
                fix="pass task_ids, or call model.set_task(name) where one task serves every example",
            )
        return self.tasks.index(self.task)

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

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the backbone."""
        self.backbone.set_input_embeddings(value)

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


def _config(
    backbone: PreTrainedModel,
    classes: Mapping[str, int | Sequence[str]],
    pooling: Literal["mean", "first"],
    dropout: float,
) -> MultiTaskConfig:
    return MultiTaskConfig(
        backbone=backbone.config,
        backbone_class=type(backbone).__name__,
        tasks=list(classes),
        labels=[_numbered(named) if isinstance(named, int) else list(named) for named in classes.values()],
        pooling=pooling,
        dropout=dropout,
        dtype=backbone.config.dtype,
        name_or_path=backbone.config.name_or_path,  # type: ignore[call-arg]  # the base class takes it
    )


def _numbered(count: int) -> list[str]:
    """Names of classes that nobody named, as transformers gives them."""
    return [f"LABEL_{index}" for index in range(count)]


def _new_backbone(config: MultiTaskConfig) -> PreTrainedModel:
    """A backbone with new weights. Its class is not always `AutoModel`'s: of T5 it is the encoder."""
    known = getattr(transformers, config.backbone_class, None)
    if isinstance(known, type) and issubclass(known, PreTrainedModel):
        return cast(PreTrainedModel, known._from_config(config.backbone))
    return cast(PreTrainedModel, AutoModel.from_config(config.backbone))


AutoConfig.register(MultiTaskConfig.model_type, MultiTaskConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MultiTaskConfig, MultiTaskClassifier, exist_ok=True)
