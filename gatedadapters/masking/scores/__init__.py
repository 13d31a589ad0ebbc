"""Importance scores, one file for each kind. To add a kind, write its file and add its class to the list below."""

from gatedadapters.config.deprecation import renamed
from gatedadapters.errors import MaskError
from gatedadapters.masking.scores.base import Batch, Loss, Score, ScoringRun
from gatedadapters.masking.scores.consistency import Consistency
from gatedadapters.masking.scores.fisher import Fisher
from gatedadapters.masking.scores.magnitude import Magnitude
from gatedadapters.masking.scores.mas import MemoryAwareSynapses
from gatedadapters.masking.scores.random import RandomScore
from gatedadapters.masking.scores.storage import Scores
from gatedadapters.masking.scores.synaptic import Synaptic
from gatedadapters.masking.scores.taylor import Taylor

_KINDS: dict[str, type[Score]] = {}


def register(score: type[Score]) -> type[Score]:
    """Make a score available by its kind. It can decorate the class of a score of your own."""
    _KINDS[score.kind] = score
    return score


def score_class(kind: str) -> type[Score]:
    """The class of a kind.

    Raises:
        MaskError: an unknown kind.
    """
    if kind not in _KINDS:
        raise MaskError(
            "no such score",
            expected=", ".join(_KINDS),
            got=repr(kind),
            where="score(kind=)",
            fix="choose one of these, or import the module that registers it",
        )
    return _KINDS[kind]


def score_kinds() -> dict[str, type[Score]]:
    """The classes of all registered scores, by kind."""
    return dict(_KINDS)


for _kind in (Taylor, Fisher, Consistency, Synaptic, MemoryAwareSynapses, Magnitude, RandomScore):
    register(_kind)

__all__ = ["Batch", "Loss", "Score", "Scores", "ScoringRun", "register", "score_class", "score_kinds"]

__getattr__ = renamed(__name__, {"Run": "ScoringRun"})
