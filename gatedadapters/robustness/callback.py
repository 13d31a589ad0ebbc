"""Noise on embeddings and gradients inside a Trainer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from gatedadapters.robustness.apply import wrong_kind
from gatedadapters.robustness.base import Corruption
from gatedadapters.robustness.noises import EmbeddingNoise, GradientNoise


class NoiseCallback(TrainerCallback):
    """Adds noise to embeddings or gradients while a Trainer trains.

    Pass it to any transformers Trainer: `GatedTrainer(..., callbacks=[NoiseCallback(noise)])`.

    Args:
        noise: `EmbeddingNoise` or `GradientNoise`.
        special: ids of tokens whose embeddings stay as they are; see `Vocabulary.special`.

    Raises:
        ConfigError: the noise is of another kind.
    """

    def __init__(self, noise: Corruption, special: frozenset[int] = frozenset()) -> None:
        if not isinstance(noise, (EmbeddingNoise, GradientNoise)):
            raise wrong_kind(noise, "a Trainer's embeddings or gradients", "corrupt_tasks or CorruptedDataset")
        self.noise, self.special = noise, special
        self._handle: Any = None
        self._step = self._forwards = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Put a hook on the model's input embeddings, if the noise is on them."""
        if isinstance(self.noise, EmbeddingNoise):
            self.remove()
            self._handle = model.get_input_embeddings().register_forward_hook(self._embedded)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count steps and passes within a step. Draws depend on these numbers, so that a resumed run draws the same."""
        self._step, self._forwards = state.global_step, 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Add noise to the gradients, if the noise is on them: they are now summed up and clipped."""
        if isinstance(self.noise, GradientNoise):
            self.noise.gradients((p for p in model.parameters() if p.requires_grad), state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hook."""
        self.remove()

    def remove(self) -> None:
        """Remove the hook from the model. Call it yourself after a training that ended with an error."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _embedded(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not module.training or not args:
            return None
        assert isinstance(self.noise, EmbeddingNoise)
        self._forwards += 1
        return self.noise.embedded(args[0], output, self.special, self._step, self._forwards)
