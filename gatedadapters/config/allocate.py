"""An allocation as data: what a search is configured by, and how candidates are judged before any training."""

from __future__ import annotations

from gatedadapters.config.base import Count
from gatedadapters.config.search import SearchConfig


class AllocateConfig(SearchConfig):
    """The configuration of `gatedadapters allocate`: that of a search, and two fields more.

    The file of a search is one, too. Of it, `model`, `tasks`, `space`, `budget` and `training` count, the latter for
    its batches, its learning rate and its seed; what concerns the training after the allocation is not used.

    Attributes:
        score: how candidates are judged: a placement score of `gatedadapters.allocation`, or a kind of importance.
        probe_batches: number of batches of each task that are read.
    """

    score: str = "gain"
    probe_batches: Count = 24
