"""Which noise or perturbation, and how much of it."""

from __future__ import annotations

from pydantic import Field

from gatedadapters.config.base import Config


class CorruptionConfig(Config):
    """A noise or a perturbation, as data.

    Attributes:
        kind: a registered name, see `gatedadapters.robustness`.
        ratio: how much, in [0, 1]; 0 is nothing, which a study may vary.
        seed: of what is chosen.
    """

    kind: str
    ratio: float = Field(ge=0, le=1)
    seed: int = 0
