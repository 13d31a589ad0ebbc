"""Noise in training, and perturbed inputs for evaluation. To add one, write its class and name it here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gatedadapters.config import CorruptionConfig
from gatedadapters.errors import ConfigError
from gatedadapters.robustness.apply import (
    CorruptedDataset,
    corrupt_batch,
    corrupt_tasks,
    corrupted_dataset,
)
from gatedadapters.robustness.base import (
    DROPPED,
    Corruption,
    Noise,
    Perturbation,
    TextPerturbation,
    TokenPerturbation,
    Vocabulary,
)
from gatedadapters.robustness.noises import EmbeddingNoise, GradientNoise, LabelNoise, TensorNoise
from gatedadapters.robustness.perturbations import (
    Case,
    NearestEmbedding,
    TokenDeletion,
    TokenMasking,
    TokenReplacement,
    TokenSwap,
    Truncation,
    Typos,
)

if TYPE_CHECKING:
    from gatedadapters.robustness.callback import NoiseCallback

_KINDS: dict[str, type[Corruption]] = {}


def register(corruption: type[Corruption]) -> type[Corruption]:
    """Make a noise or a perturbation known by its kind. Usable as a decorator on a class of your own."""
    _KINDS[corruption.kind] = corruption
    return corruption


def corruption_kinds() -> dict[str, type[Corruption]]:
    """Every registered kind by name."""
    return dict(_KINDS)


def corruption(config: CorruptionConfig, *, only: type[Corruption] = Corruption, where: str = "kind") -> Corruption:
    """Build the noise or perturbation that a configuration describes.

    Args:
        config: kind, ratio and seed.
        only: a class that the kind must be a subclass of, such as `Perturbation`.
        where: the key of the configuration, for errors.

    Raises:
        ConfigError: the kind is unknown, or no subclass of `only`; or the ratio lies outside [0, 1].
    """
    known = [kind for kind, found in _KINDS.items() if issubclass(found, only)]
    if config.kind not in known:
        raise ConfigError(
            "no such noise or perturbation",
            expected=", ".join(known),
            got=repr(config.kind),
            where=where,
            fix=(
                "noise on labels, embeddings and gradients is for training only"
                if config.kind in _KINDS
                else "name one of these"
            ),
        )
    return _KINDS[config.kind](config.ratio, seed=config.seed)


def __getattr__(name: str) -> Any:
    if name == "NoiseCallback":  # transformers' Trainer takes seconds to import
        from gatedadapters.robustness.callback import NoiseCallback

        return NoiseCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


for _kind in (
    *(LabelNoise, EmbeddingNoise, GradientNoise),
    *(TokenDeletion, TokenReplacement, TokenMasking, TokenSwap, Truncation, NearestEmbedding),
    *(Typos, Case),
):
    register(_kind)

__all__ = [
    "DROPPED",
    "Case",
    "CorruptedDataset",
    "Corruption",
    "CorruptionConfig",
    "EmbeddingNoise",
    "GradientNoise",
    "LabelNoise",
    "NearestEmbedding",
    "Noise",
    "NoiseCallback",
    "Perturbation",
    "TensorNoise",
    "TextPerturbation",
    "TokenDeletion",
    "TokenMasking",
    "TokenPerturbation",
    "TokenReplacement",
    "TokenSwap",
    "Truncation",
    "Typos",
    "Vocabulary",
    "corrupt_batch",
    "corrupt_tasks",
    "corrupted_dataset",
    "corruption",
    "corruption_kinds",
    "register",
]
