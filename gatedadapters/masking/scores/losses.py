"""What is differentiated where the caller names nothing else: one loss per example."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatedadapters.errors import MaskError
from gatedadapters.masking.scores.base import Batch

_IGNORED = -100
_CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # the last also of models that read pictures


def task_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy per example, (examples,): of its class, or the mean over its labelled tokens.

    Causal language models predict the next token, and where the batch has no labels, every real token is one; other
    models with a label per token predict in place. Tokens labelled -100 do not count, so labels on answers alone give
    the answer-only loss. Floating-point labels: squared error.

    Raises:
        MaskError: a model that is no causal language model, and no labels.
    """
    sums, counts = _sums(model, batch)
    return sums / counts.clamp(min=1)


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """The same, weighted so that the mean over examples is the mean over all labelled tokens of the batch, (examples,):
    the loss of a training step, in which long answers count more.
    """
    sums, counts = _sums(model, batch)
    return sums * (len(counts) / counts.sum().clamp(min=1))


def _sums(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """By example the sum of losses and how many there were, both (examples,)."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels: Tensor | None = batch.get("labels")
    needs_labels = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    causal = type(model).__name__.endswith(_CAUSAL) and not needs_labels
    if labels is None and causal:
        ids: Tensor = inputs["input_ids"]
        mask: Tensor | None = inputs.get("attention_mask")
        labels = ids if mask is None else ids.masked_fill(mask == 0, _IGNORED)
    if labels is None:
        raise MaskError(
            "there is nothing to compute a loss from",
            expected="labels in the batch",
            got=", ".join(batch),
            where="score",
            fix='add labels, pass loss=, or use a label-free kind such as "mas"',
        )
    output = model(**inputs, labels=labels) if needs_labels and "decoder_input_ids" not in inputs else model(**inputs)
    logits = first_tensor(output, "logits").float() if not _is_double(model) else first_tensor(output, "logits")
    if labels.is_floating_point():
        losses = (logits.reshape(len(labels), -1) - labels.reshape(len(labels), -1)).square().mean(1)
        return losses, torch.ones_like(losses)
    if labels.dim() == 1:
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses, torch.ones_like(losses)
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=_IGNORED)
    return each.sum(1), (labels != _IGNORED).sum(1)


def output_norms(model: nn.Module, batch: Batch) -> Tensor:
    """Squared L2 norm of the model's output per example, (examples,), the mean over its real tokens; no labels."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    output = first_tensor(model(**inputs), "logits")
    norms = output.square().sum(-1) if _is_double(model) else output.float().square().sum(-1)
    if norms.dim() == 1:
        return norms
    mask: Tensor | None = inputs.get("attention_mask")
    if mask is None or mask.shape != norms.shape:
        return norms.reshape(len(norms), -1).mean(1)
    return (norms * mask).sum(1) / mask.sum(1).clamp(min=1)


def first_tensor(output: Any, name: str) -> Tensor:
    """A model output's field of this name, else its first tensor."""
    found = getattr(output, name, None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    first: Tensor = next(value for value in values if isinstance(value, Tensor))
    return first


def _is_double(model: nn.Module) -> bool:
    return next((p.dtype for p in model.parameters()), torch.float32) == torch.float64
