"""The placement scores by name. To add one, write its file and add its class to the list below."""

from gatedadapters.allocation.base import PlacementScore
from gatedadapters.allocation.closing import Closing
from gatedadapters.allocation.consistency import Consistency
from gatedadapters.allocation.eva import ExplainedVariance
from gatedadapters.allocation.fisher import Fisher
from gatedadapters.allocation.gain import Gain
from gatedadapters.allocation.gora import GoRA
from gatedadapters.allocation.gradient import Gradient
from gatedadapters.allocation.importance import Importance
from gatedadapters.allocation.kappa import Kappa
from gatedadapters.allocation.magnitude import Magnitude
from gatedadapters.allocation.moved import Moved
from gatedadapters.allocation.nfn import NormalizedFeatureNorm
from gatedadapters.allocation.random import RandomWorth
from gatedadapters.allocation.rgn import RelativeGradientNorm
from gatedadapters.allocation.taylor import Taylor
from gatedadapters.errors import AllocationError
from gatedadapters.masking.scores import score_kinds as importance_kinds

_KINDS: dict[str, type[PlacementScore]] = {}


def register(score: type[PlacementScore]) -> type[PlacementScore]:
    """Make a score available by its kind; also a decorator for scores of your own."""
    _KINDS[score.kind] = score
    return score


def placement_score(kind: str, *, where: str = "allocate(score=)") -> PlacementScore:
    """The score of a kind: one of `score_kinds`, or an importance score of `masking`.

    Args:
        kind: name of the score.
        where: where the name was given, for the error.

    Raises:
        AllocationError: an unknown kind.
    """
    if kind in _KINDS:
        return _KINDS[kind]()
    if kind in importance_kinds():
        return Importance(kind)
    raise AllocationError(
        "no such placement score",
        expected=", ".join((*_KINDS, *(k for k in importance_kinds() if k not in _KINDS))),
        got=repr(kind),
        where=where,
        fix="name one of these, or register your own",
    )


def score_kinds() -> dict[str, type[PlacementScore]]:
    """The classes of all registered scores, by kind."""
    return dict(_KINDS)


for _kind in (
    Gain,
    Moved,
    Closing,
    Consistency,
    Taylor,
    Gradient,
    Fisher,
    RelativeGradientNorm,
    GoRA,
    NormalizedFeatureNorm,
    Kappa,
    ExplainedVariance,
    Magnitude,
    RandomWorth,
):
    register(_kind)
