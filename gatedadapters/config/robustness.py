"""The configuration of a noise or a perturbation."""

from __future__ import annotations

from pydantic import Field

from gatedadapters.config.base import Config, Seed


class CorruptionConfig(Config):
    """A noise, which training meets, or a perturbation, which test data meet.

    Attributes:
        kind: a registered name; see `gatedadapters.robustness`.
        ratio: how much of it, in [0, 1]. 0 changes nothing; a study may still vary it from there.
        seed: decides which texts, tokens or values are changed.
    """

    kind: str
    ratio: float = Field(ge=0, le=1)
    seed: Seed = 0
