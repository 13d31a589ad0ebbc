"""Token-adaptive loss reweighting: tokens that the model finds hard count less, so that tuning disturbs less."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatedadapters.errors import TrainingError

_IGNORED = -100


def token_weights(losses: Tensor, temperature: Tensor | float, *, floor: float = 0.0) -> Tensor:
    """Weights of tokens, with mean 1: `exp(-loss / temperature)`, at least `floor`, divided by their mean.

    Without a floor, they solve `min_w Σ w_i loss_i + temperature Σ w_i log w_i` over weights with sum 1, times the
    number of tokens.

    Args:
        losses: (tokens,) cross-entropies.
        temperature: τ, above 0. The larger, the more equal are the weights.
        floor: least value before the division.
    """
    weights = (-losses / temperature).exp().clamp(min=floor)
    return weights / weights.mean()


class TokenAdaptiveLoss:
    """The loss of a causal language model with token-adaptive weights (TALR); for `compute_loss_func` of any Trainer::

        trainer = ga.SelectiveTrainer(model, args, ..., compute_loss_func=ga.TokenAdaptiveLoss())

    A token that the model gives probability p counts in proportion to p^(1/τ), see `token_weights`; no gradient passes
    through the weights. They are normalised over the tokens of the batch (of the micro-batch, under accumulation), so
    that the loss is as large as usual, and rates need not be changed. Where no gradients are computed, as in an
    evaluation, all tokens count alike.

    Args:
        temperature: τ. Default: in each batch the median, over its sequences, of their mean losses.
        floor: least weight of a token before they are normalised. It keeps hard tokens in the game.

    Raises:
        TrainingError: the temperature is not above 0, or the floor is outside [0, 1].

    References:
        Lin et al. 2025, "SFT Doesn't Always Hurt General Capabilities: Revisiting Domain-Specific Fine-Tuning in LLMs",
        arXiv 2509.20758. The weights are the closed form there, and the temperature and a floor of 0.01 are theirs;
        dividing by the mean is ours.
    """

    def __init__(self, temperature: float | None = None, floor: float = 0.01) -> None:
        if temperature is not None and not temperature > 0:
            raise TrainingError(
                expected="a temperature above 0, or None",
                got=temperature,
                where="TokenAdaptiveLoss(temperature=)",
                fix="raise it, or leave it out",
            )
        if not 0.0 <= floor <= 1.0:
            raise TrainingError(
                expected="a floor in [0, 1]", got=floor, where="TokenAdaptiveLoss(floor=)", fix="give such a value"
            )
        self.temperature, self.floor = temperature, floor

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss, a differentiable scalar.

        Args:
            outputs: of the model, with logits (examples, tokens, vocabulary).
            labels: (examples, tokens) token ids, -100 where nothing is learned. A token predicts the next one.
            num_items_in_batch: tokens in all micro-batches of a step, which the sum is divided by; default: those here.

        Raises:
            TrainingError: these are not the outputs and labels of a causal language model.
        """
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if logits.dim() != 3 or labels.shape != logits.shape[:2]:
            raise TrainingError(
                "token-adaptive weights need a label for every token",
                expected="logits (examples, tokens, vocabulary) and labels (examples, tokens)",
                got=f"{tuple(logits.shape)} and {tuple(labels.shape)}",
                where="TokenAdaptiveLoss",
                fix="use it with a causal language model",
            )
        targets = F.pad(labels[:, 1:], (0, 1), value=_IGNORED)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        learned = targets.flatten() != _IGNORED
        if not bool(learned.any()):
            return losses.sum()  # 0, with a gradient
        total, count = losses.sum(), learned.sum()
        if torch.is_grad_enabled():
            with torch.no_grad():
                temperature = self._temperature(losses.view_as(targets), targets != _IGNORED)
                weights = token_weights(losses[learned], temperature, floor=self.floor)
            total = (weights * losses[learned]).sum()
        return total / (count if num_items_in_batch is None else num_items_in_batch)

    def _temperature(self, losses: Tensor, learned: Tensor) -> Tensor | float:
        """τ for the losses of a batch, (examples, tokens)."""
        if self.temperature is not None:
            return self.temperature
        counts = learned.sum(1)
        means = (losses * learned).sum(1)[counts > 0] / counts[counts > 0]
        return means.median().clamp(min=torch.finfo(losses.dtype).eps)
