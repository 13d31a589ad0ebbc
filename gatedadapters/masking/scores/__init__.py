"""Importance scores, one file per kind. To add one: write its file, and name its class here."""

from gatedadapters.errors import MaskError
from gatedadapters.masking.scores.base import Batch, Loss, Run, Score
from gatedadapters.masking.scores.fisher import Fisher
from gatedadapters.masking.scores.magnitude import Magnitude
from gatedadapters.masking.scores.mas import MemoryAwareSynapses
from gatedadapters.masking.scores.random import Random
from gatedadapters.masking.scores.storage import Scores
from gatedadapters.masking.scores.synaptic import Synaptic
from gatedadapters.masking.scores.taylor import Taylor

_KINDS: dict[str, type[Score]] = {}


def register(score: type[Score]) -> type[Score]:
    """Make a score known by its kind; usable as a decorator on an outsider's class."""
    _KINDS[score.kind] = score
    return score


def score_class(kind: str) -> type[Score]:
    """The class behind a kind.

    Raises:
        MaskError: unknown kind.
    """
    if kind not in _KINDS:
        raise MaskError("no such score", expected=", ".join(_KINDS), got=repr(kind), where="score(kind=)")
    return _KINDS[kind]


def score_kinds() -> dict[str, type[Score]]:
    """Every registered kind by name."""
    return dict(_KINDS)


for _kind in (Taylor, Fisher, Synaptic, MemoryAwareSynapses, Magnitude, Random):
    register(_kind)

__all__ = ["Batch", "Loss", "Run", "Score", "Scores", "register", "score_class", "score_kinds"]
