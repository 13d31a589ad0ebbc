"""Noise in training, one class each: labels, embeddings, gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from gatedadapters.errors import ConfigError
from gatedadapters.robustness.base import Noise


class LabelNoise(Noise):
    """Labels become wrong ones, each wrong class with equal probability; the ratio is the share of examples."""

    kind = "label"

    def labels(self, labels: Sequence[int], n_classes: int, key: int = 0) -> list[int]:
        """Labels of a split, some of them wrong.

        Raises:
            ConfigError: there is no other class.
        """
        if n_classes < 2:
            raise ConfigError(
                "a label cannot be wrong",
                expected="2 classes or more",
                got=n_classes,
                where=self.kind,
                fix="give the number of classes of the task",
            )
        draw, noisy = self.generator(key), list(labels)
        for index in self.choose(range(len(noisy)), draw):
            drawn = int(draw.integers(0, n_classes - 1))
            noisy[index] = drawn + (drawn >= noisy[index])
        return noisy


class TensorNoise(Noise):
    """Gaussian noise on tensors; the ratio is its root mean square by that of what it is added to."""

    def noise(self, value: Tensor, *key: int) -> Tensor:
        """Noise for a tensor, of its shape, type and device."""
        seed = int(self.generator(*key).integers(0, 2**31))
        generator = torch.Generator(value.device).manual_seed(seed)
        drawn = torch.randn(value.shape, generator=generator, device=value.device, dtype=torch.float32)
        size = self.ratio * value.detach().float().square().mean().sqrt()
        return (drawn * size).to(value.dtype)


class EmbeddingNoise(TensorNoise):
    """Gaussian noise on the embeddings of ordinary tokens, drawn anew in each training step."""

    kind = "embedding"

    def embedded(self, ids: Tensor, output: Tensor, special: Collection[int], *key: int) -> Tensor:
        """What an embedding module put out for `ids` (batch, length), with noise: (batch, length, width)."""
        if not self.ratio:
            return output
        touched = ~torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype, device=ids.device))
        if not bool(touched.any()):
            return output
        noisy = output.clone()
        noisy[touched] = output[touched] + self.noise(output[touched], *key)
        return noisy


class GradientNoise(TensorNoise):
    """Gaussian noise on every gradient, after it is clipped and averaged over processes, which all draw the same."""

    kind = "gradient"

    @torch.no_grad()
    def gradients(self, parameters: Iterable[nn.Parameter], key: int = 0) -> None:
        """Add noise to the gradients of parameters, in place."""
        if not self.ratio:
            return
        for index, parameter in enumerate(parameters):
            if parameter.grad is not None:
                parameter.grad += self.noise(parameter.grad, key, index)
