"""Lottery ticket adaptation: the elements that full fine-tuning moves most, retrained alone."""

from __future__ import annotations

from gatedadapters.config import CoreConfig
from gatedadapters.continual.strategies.probed import Probed


class LoTA(Probed):
    """The largest |Δ| over all elements; values are trained again from where the model was before the task.

    References:
        Panda et al. 2024, "Lottery Ticket Adaptation: Mitigating Destructive Interference in LLMs", arXiv 2406.16797.
    """

    kind = "lota"
    quantity = "delta"
    core: CoreConfig = CoreConfig(share=0.1, granularity="element")
