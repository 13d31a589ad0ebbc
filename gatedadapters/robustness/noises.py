"""Noise in training, one class for each kind: labels, embeddings, gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from gatedadapters.errors import ConfigError
from gatedadapters.robustness.base import Noise


class LabelNoise(Noise):
    """Replaces labels by wrong ones; each wrong class is equally likely. The ratio is the share of examples."""

    kind = "label"

    def labels(self, labels: Sequence[int], n_classes: int, key: int = 0) -> list[int]:
        """The labels of a split, with some of them replaced.

        Args:
            labels: indices of classes; they are not changed.
            n_classes: of the task.
            key: for example the task's position: splits with different keys are changed at different examples.

        Raises:
            ConfigError: the task has fewer than two classes.
        """
        if n_classes < 2:
            raise ConfigError(
                "a task with one class has no wrong labels",
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
    """Gaussian noise on tensors. The ratio is the root mean square of the noise over that of the tensor."""

    def noise(self, value: Tensor, *key: int) -> Tensor:
        """Noise of the tensor's shape, type and device; it depends on kind, seed and `key` alone."""
        seed = int(self.generator(*key).integers(0, 2**31))
        generator = torch.Generator(value.device).manual_seed(seed)
        drawn = torch.randn(value.shape, generator=generator, device=value.device, dtype=torch.float32)
        size = self.ratio * value.detach().float().square().mean().sqrt()
        return (drawn * size).to(value.dtype)


class EmbeddingNoise(TensorNoise):
    """Gaussian noise on the embeddings of ordinary tokens, drawn anew in each training step."""

    kind = "embedding"

    def embedded(self, ids: Tensor, output: Tensor, special: Collection[int], *key: int) -> Tensor:
        """The output of an embedding module with noise on the embeddings of ordinary tokens.

        Args:
            ids: token ids (batch, length).
            output: of the module, (batch, length, width); it is not changed.
            special: ids of tokens whose embeddings stay as they are.
            *key: of the draw.
        """
        if not self.ratio:
            return output
        touched = ~torch.isin(ids, torch.tensor(sorted(special), dtype=ids.dtype, device=ids.device))
        if not bool(touched.any()):
            return output
        noisy = output.clone()
        noisy[touched] = output[touched] + self.noise(output[touched], *key)
        return noisy


class GradientNoise(TensorNoise):
    """Gaussian noise on every gradient, after clipping. In distributed training all processes draw the same noise."""

    kind = "gradient"

    @torch.no_grad()
    def gradients(self, parameters: Iterable[nn.Parameter], key: int = 0) -> None:
        """Add noise to the gradients of parameters, in place.

        Args:
            parameters: those without a gradient are skipped.
            key: of the draw; for example the number of the step.
        """
        if not self.ratio:
            return
        for index, parameter in enumerate(parameters):
            if parameter.grad is not None:
                parameter.grad += self.noise(parameter.grad, key, index)
