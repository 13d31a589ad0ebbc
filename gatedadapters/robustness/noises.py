"""Noise in training, one class for each kind: labels, embeddings, gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from gatedadapters.data.tasks import ChoiceExample, Conversation, Example, Passage
from gatedadapters.errors import ConfigError
from gatedadapters.robustness.base import Noise


class LabelNoise(Noise):
    """Replaces labels by wrong ones; each wrong class is equally likely. The ratio is the share of examples.

    Of multiple-choice questions, another choice becomes the right one. Texts with answers and conversations exchange
    their (last) answers among each other.
    """

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

    def language_examples(self, examples: Sequence[Example], key: int = 0) -> tuple[Example, ...]:
        """The examples of a split of a language task, some with a wrong answer.

        Args:
            examples: they are not changed.
            key: for example the task's position: splits with different keys are changed at different examples.

        Raises:
            ConfigError: the examples are running text, or all have one answer.
        """
        draw = self.generator(key)
        chosen = self.choose(range(len(examples)), draw).tolist()
        noisy = list(examples)
        if isinstance(examples[0], ChoiceExample):
            for index in chosen:
                example = noisy[index]
                assert isinstance(example, ChoiceExample)
                drawn = int(draw.integers(0, len(example.choices) - 1))
                noisy[index] = replace(example, answer=drawn + (drawn >= example.answer))
            return tuple(noisy)
        answers = [_answer(example) for example in noisy]
        if None in answers or len(set(answers)) < 2:
            raise ConfigError(
                "these examples have no answers to exchange",
                expected="texts with answers, conversations or choices, with two different answers or more",
                got="running text" if None in answers else "one answer",
                where=self.kind,
                fix="give an answer column, or another noise: embedding and gradient act on running text",
            )
        # In this order equal answers stand side by side. A shift by the longest such run gives each example another
        # answer, unless one answer is that of most examples.
        order = sorted(draw.permutation(chosen).tolist(), key=lambda index: str(answers[index]))
        shift = max(Counter(answers[index] for index in chosen).values(), default=0)
        for place, index in enumerate(order):
            noisy[index] = _answered(noisy[index], str(answers[order[(place + shift) % len(order)]]))
        return tuple(noisy)


def _answer(example: Passage | Conversation | ChoiceExample) -> str | None:
    """The answer of a passage, or the last one of a conversation."""
    if isinstance(example, Conversation):
        return example.messages[-1].content
    assert isinstance(example, Passage)
    return example.answer


def _answered(example: Example, answer: str) -> Example:
    """The example with another (last) answer."""
    if isinstance(example, Conversation):
        *before, last = example.messages
        return Conversation((*before, last._replace(content=answer)))
    assert isinstance(example, Passage)
    return example._replace(answer=answer)


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
