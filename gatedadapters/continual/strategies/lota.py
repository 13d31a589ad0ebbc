"""Lottery ticket adaptation: the elements that full fine-tuning moves most, trained again alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import field_validator

from gatedadapters.config import CoreConfig
from gatedadapters.continual.strategies.probed import Probed


class LoTA(Probed):
    """The core is the elements with the largest |Δ|, Δ the update of a probe. They are trained again from the values
    that they had before the task.

    References:
        Panda et al. 2024, "Lottery Ticket Adaptation: Mitigating Destructive Interference in LLMs", arXiv 2406.16797.
    """

    kind = "lota"
    quantity = "delta"
    core: CoreConfig = CoreConfig(granularity="element")

    @field_validator("core", mode="before")
    @classmethod
    def _by_element(cls, core: Any) -> Any:
        """Keep the granularity `element` where other options of the core are given."""
        return {"granularity": "element", **core} if isinstance(core, Mapping) else core
