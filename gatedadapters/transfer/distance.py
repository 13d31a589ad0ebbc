"""How far the outputs of two models are apart."""

from __future__ import annotations

import torch
from torch import Tensor

from gatedadapters.errors import DataError
from gatedadapters.masking.scores import Batch


def distance(output: Tensor, target: Tensor, mask: Tensor | None = None, *, hidden: bool = False) -> Tensor:
    """How far a model's outputs are from a teacher's: a differentiable scalar, 0 where they are equal.

    Classes and tokens: KL(teacher || model) in nats. A single number for each example, and hidden states: the squared
    error over the teacher's mean square.

    Args:
        output: (..., classes), the model's logits, or (..., width), its hidden states.
        target: the teacher's, of the same shape.
        mask: (...), 1 for tokens that count and 0 for padding; one of another shape does not count.
        hidden: whether the outputs are hidden states.

    Raises:
        DataError: the shapes differ.
    """
    if output.shape != target.shape:
        raise DataError(
            "the outputs of two models for a batch have different shapes",
            expected=f"a tensor {tuple(output.shape)}",
            got=f"{tuple(target.shape)}",
            where="outputs of two versions of a base",
            fix="give two versions of the same model, with the same heads, and the batches that both ran on",
        )
    output, target = output.float(), target.to(output.device).float()
    if mask is None or mask.shape != output.shape[:-1]:
        mask = output.new_ones(output.shape[:-1])
    mask = mask.to(output)
    if hidden or output.shape[-1] == 1:
        error, size = (output - target).square().sum(-1) * mask, target.square().sum(-1) * mask
        return error.sum() / size.sum().clamp(min=torch.finfo(size.dtype).tiny)
    log_p, log_q = target.log_softmax(-1), output.log_softmax(-1)
    p = log_p.exp()
    each = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)  # of classes that a task lacks p is 0
    return (each * mask).sum() / mask.sum().clamp(min=1)


def padding_mask(batch: Batch) -> Tensor | None:
    """The mask of the tokens that a model answers for; None if the batch has none."""
    mask: Tensor | None = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    return mask
