"""The hard-concrete distribution, equation by equation.

References:
    Louizos, Welling, Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization", arXiv 1712.01312:
    equation 10 (stretched and clamped sample), equation 12 (probability of being open), equation 13 (test-time gate).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gatedadapters.config import GateConfig


def logistic_noise(shape: tuple[int, ...], config: GateConfig, generator: torch.Generator) -> Tensor:
    """Logistic noise log u - log(1 - u), u uniform in (epsilon, 1 - epsilon).

    It is drawn on the CPU, so that every device gets the same values. It is computed in float64 and returned in
    float32: in low precision 1 - 1e-6 rounds to 1, and log(1 - u) is -inf.
    """
    u = torch.rand(shape, generator=generator, dtype=torch.float64)
    u = config.epsilon + (1 - 2 * config.epsilon) * u
    return torch.logit(u).float()


def sample(log_alpha: Tensor, noise: Tensor | None, config: GateConfig) -> Tensor:
    """Gates in [0, 1] of the shape of `log_alpha`: random with `noise` from `logistic_noise`, test-time without.

    With noise: s = sigmoid((noise + log alpha) / beta), z = clamp(s (zeta - gamma) + gamma, 0, 1) (equation 10).
    Without: s = sigmoid(log alpha) (equation 13).
    """
    s = torch.sigmoid(log_alpha if noise is None else (noise + log_alpha) / config.temperature)
    return (s * (config.high - config.low) + config.low).clamp(0.0, 1.0)


def slope(log_alpha: Tensor, noise: Tensor | None, config: GateConfig) -> Tensor:
    """Derivative of `sample` by log alpha, in closed form; exactly 0 where the clamp is saturated."""
    s = torch.sigmoid(log_alpha if noise is None else (noise + log_alpha) / config.temperature)
    stretched = s * (config.high - config.low) + config.low
    inside = (stretched > 0) & (stretched < 1)
    scale = (config.high - config.low) / (1.0 if noise is None else config.temperature)
    return torch.where(inside, s * (1 - s) * scale, torch.zeros_like(s))


def open_probability(log_alpha: Tensor, config: GateConfig) -> Tensor:
    """P(z != 0) = sigmoid(log alpha - beta log(-gamma / zeta)) (equation 12)."""
    return torch.sigmoid(log_alpha - config.temperature * math.log(-config.low / config.high))
