"""Noise inside a Trainer."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from gatedadapters.robustness.apply import cannot
from gatedadapters.robustness.base import Corruption
from gatedadapters.robustness.noises import EmbeddingNoise, GradientNoise


class NoiseCallback(TrainerCallback):
    """Noise on embeddings or gradients while a Trainer trains: `GatedTrainer(..., callbacks=[NoiseCallback(noise)])`.

    Args:
        noise: on embeddings or gradients.
        special: ids of tokens whose embeddings stay: `Vocabulary.special`.

    Raises:
        ConfigError: the noise is of another kind.
    """

    def __init__(self, noise: Corruption, special: frozenset[int] = frozenset()) -> None:
        if not isinstance(noise, (EmbeddingNoise, GradientNoise)):
            raise cannot(noise, "a Trainer's embeddings or gradients", "corrupt_tasks or CorruptedDataset")
        self.noise, self.special = noise, special
        self._handle: Any = None
        self._step = self._forwards = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Look at what the embeddings put out from now on."""
        if isinstance(self.noise, EmbeddingNoise):
            self.remove()
            self._handle = model.get_input_embeddings().register_forward_hook(self._embedded)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draws go by the step and the pass within it, so that a resumed run goes on with them."""
        self._step, self._forwards = state.global_step, 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Gradients are complete."""
        if isinstance(self.noise, GradientNoise):
            self.noise.gradients((p for p in model.parameters() if p.requires_grad), state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hook out."""
        self.remove()

    def remove(self) -> None:
        """Take the hook out of the model; for runs that ended with an error."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _embedded(self, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not module.training or not args:
            return None
        assert isinstance(self.noise, EmbeddingNoise)
        self._forwards += 1
        return self.noise.embedded(args[0], output, self.special, self._step, self._forwards)
