"""Which noise or perturbation, and how much of it."""

from __future__ import annotations

from pydantic import Field

from gatedadapters.config.base import Config


class CorruptionConfig(Config):
    """A noise or a perturbation, as data.

    Attributes:
        kind: a registered name, see `gatedadapters.robustness`.
        ratio: how much, in [0, 1].
        seed: of what is chosen.
    """

    kind: str
    ratio: float = Field(0.0, ge=0, le=1)
    seed: int = 0
