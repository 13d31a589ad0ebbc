"""The default losses of scores: one loss per example."""

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
    """Cross-entropy per example, (examples,): that of its class, or the mean over its labelled tokens.

    A causal language model predicts the next token. If the batch has no labels, its tokens are the labels, without
    padding. Other models with one label per token predict in place. Tokens labelled -100 do not count, so a batch with
    labels on the answers alone gives the loss of the answers. Floating-point labels give the squared error.

    Raises:
        MaskError: the batch has no labels, and the model is no causal language model.
    """
    sums, counts = _sums(model, batch)
    return sums / counts.clamp(min=1)


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Losses per example, (examples,), whose mean is the mean over all labelled tokens of the batch.

    This is the loss of a training step, in which long answers count more than short ones.

    Raises:
        MaskError: see `task_losses`.
    """
    sums, counts = _sums(model, batch)
    return sums * (len(counts) / counts.sum().clamp(min=1))


def _sums(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """For each example the sum of its losses and their number, both (examples,)."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels: Tensor | None = batch.get("labels")
    needs_labels = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    causal = _is_causal(model) and not needs_labels
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
    logits = logits_of(output).float() if not _is_double(model) else logits_of(output)
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


def _is_causal(model: nn.Module) -> bool:
    """Whether a model predicts the next token, by the class it is of or derives from; peft, torch.compile and
    data-parallel wrappers are looked through.
    """
    for name in ("_orig_mod", "module"):
        model = getattr(model, name, model)
    base: Any = getattr(model, "get_base_model", None)
    return any(kind.__name__.endswith(_CAUSAL) for kind in type(model if base is None else base()).__mro__)


def output_norms(model: nn.Module, batch: Batch) -> Tensor:
    """Squared L2 norm of the model's output per example, (examples,), as the mean over its tokens without padding."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    output = logits_of(model(**inputs))
    norms = output.square().sum(-1) if _is_double(model) else output.float().square().sum(-1)
    if norms.dim() == 1:
        return norms
    mask: Tensor | None = inputs.get("attention_mask")
    if mask is None or mask.shape != norms.shape:
        return norms.reshape(len(norms), -1).mean(1)
    return (norms * mask).sum(1) / mask.sum(1).clamp(min=1)


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output, or its first tensor if it has none."""
    found = getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    first: Tensor = next(value for value in values if isinstance(value, Tensor))
    return first


def _is_double(model: nn.Module) -> bool:
    return next((p.dtype for p in model.parameters()), torch.float32) == torch.float64
