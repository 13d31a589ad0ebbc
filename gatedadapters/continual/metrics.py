"""What a stream of tasks taught and cost, from the matrix of scores.

`R[t][i]` is the score on task i after training on task t (both counted from 0, T tasks), `b[i]` that of the untrained
model, `g[t]` a score of general ability after t tasks (`g[0]` of the untrained model).

References:
    Lopez-Paz and Ranzato 2017, "Gradient Episodic Memory for Continual Learning", arXiv 1706.08840, section 2: OP
    (there ACC), BWT and FWT. Chaudhry et al. 2018, "Riemannian Walk for Incremental Learning", arXiv 1801.10112,
    section 4: forgetting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean

from gatedadapters.errors import DataError
from gatedadapters.reporting.intervals import Interval
from gatedadapters.reporting.tables import format_table

Matrix = Sequence[Sequence[float]]
"""One row for every stage; `(T, T)`, or `(1, T)` where all tasks were learned at once."""


def overall_performance(R: Matrix) -> float:
    """`OP = mean_i R[T-1][i]`: the mean score over all tasks at the end."""
    _checked(R)
    return mean(R[-1])


def backward_transfer(R: Matrix) -> float | None:
    """`BWT = mean_{i<T-1} (R[T-1][i] - R[i][i])`: how later tasks changed earlier ones; below 0 says forgotten.

    None where there is one task, or all were learned at once.
    """
    _checked(R)
    tasks = len(R[0])
    if len(R) < 2:
        return None
    return mean(R[-1][i] - R[i][i] for i in range(tasks - 1))


def forward_transfer(R: Matrix, b: Sequence[float]) -> float | None:
    """`FWT = mean_{i>0} (R[i-1][i] - b[i])`: what earlier tasks did for one that is not trained yet.

    Where each task has a head of its own, it is read out through an untrained head and says little. None where there
    is one task, or all were learned at once.
    """
    _checked(R, b)
    if len(R) < 2:
        return None
    return mean(R[i - 1][i] - b[i] for i in range(1, len(R[0])))


def forgetting(R: Matrix) -> float | None:
    """`F = mean_{i<T-1} (max_{t<T-1} R[t][i] - R[T-1][i])`: how far each task fell from its best; above 0 says
    forgotten.

    The best is that of all earlier stages, as in the source, also of those before the task's own training. None where
    there is one task, or all were learned at once.
    """
    _checked(R)
    last = len(R) - 1
    if last < 1:
        return None
    return mean(max(R[t][i] for t in range(last)) - R[last][i] for i in range(last))


def general_delta(g: Sequence[float]) -> float | None:
    """`G = g[-1] - g[0]`: what the stream did to a score that was never trained; None where none was measured."""
    return g[-1] - g[0] if len(g) > 1 else None


@dataclass(frozen=True, slots=True)
class Metrics:
    """All of them for one stream; None where one is not defined."""

    op: float
    bwt: float | None
    fwt: float | None
    forgetting: float | None
    general_delta: float | None

    @classmethod
    def of(cls, R: Matrix, b: Sequence[float], g: Sequence[float] = ()) -> Metrics:
        """From the matrix, the untrained scores and the general scores.

        Raises:
            DataError: shapes that do not fit.
        """
        return cls(
            overall_performance(R), backward_transfer(R), forward_transfer(R, b), forgetting(R), general_delta(g)
        )


NAMES = {"op": "OP", "bwt": "BWT", "fwt": "FWT", "forgetting": "forgetting", "general_delta": "general delta"}


def intervals(streams: Sequence[Metrics]) -> dict[str, Interval | None]:
    """Each metric over several streams (orders, seeds) of one strategy; None where it is not defined."""
    found: dict[str, Interval | None] = {}
    rows = [asdict(stream) for stream in streams]
    for name in NAMES:
        values = [row[name] for row in rows if row[name] is not None]
        found[name] = Interval.of(values) if values else None
    return found


def metrics_table(strategies: dict[str, Sequence[Metrics]]) -> str:
    """One line a strategy."""
    rows = []
    for name, streams in strategies.items():
        cells = ["-" if part is None else str(part) for part in intervals(streams).values()]
        rows.append([name, str(len(streams)), *cells])
    return format_table(["strategy", "streams", *NAMES.values()], rows)


def _checked(R: Matrix, b: Sequence[float] | None = None) -> None:
    width = len(R[0]) if R else 0
    square = len(R) in (1, width) and all(len(row) == width for row in R)
    if not width or not square or (b is not None and len(b) != width):
        shape = f"{len(R)} rows of {sorted({len(row) for row in R})}" + ("" if b is None else f", b of {len(b)}")
        raise DataError(
            "this is no matrix of scores", expected="T rows of T scores, or one row", got=shape, where="metrics"
        )
