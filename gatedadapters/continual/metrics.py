"""Metrics of continual learning, computed from the matrix of scores.

With T tasks counted from 0, `R[t][i]` is the score on task i after training on task t. `b[i]` is the score of the
untrained model on task i. `g[t]` is a score of general ability after t tasks; `g[0]` is that of the untrained model.

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
"""R, one row for each stage: `(T, T)`, or `(1, T)` where all tasks were learned at once."""


def overall_performance(R: Matrix) -> float:
    """`OP = mean_i R[T-1][i]`: the mean score over all tasks at the end.

    Raises:
        DataError: R is no matrix of scores.
    """
    _check_matrix(R)
    return mean(R[-1])


def backward_transfer(R: Matrix) -> float | None:
    """`BWT = mean_{i<T-1} (R[T-1][i] - R[i][i])`: by how much later tasks changed the scores of earlier ones.

    A value below 0 means forgetting. None where there is one task, or all were learned at once.

    Raises:
        DataError: R is no matrix of scores.
    """
    _check_matrix(R)
    tasks = len(R[0])
    if len(R) < 2:
        return None
    return mean(R[-1][i] - R[i][i] for i in range(tasks - 1))


def forward_transfer(R: Matrix, b: Sequence[float]) -> float | None:
    """`FWT = mean_{i>0} (R[i-1][i] - b[i])`: by how much earlier tasks improved a task before it is trained.

    Where each task has a head of its own, the score comes from an untrained head, and FWT says little. None where there
    is one task, or all were learned at once.

    Raises:
        DataError: R is no matrix of scores, or b has another length.
    """
    _check_matrix(R, b)
    if len(R) < 2:
        return None
    return mean(R[i - 1][i] - b[i] for i in range(1, len(R[0])))


def forgetting(R: Matrix) -> float | None:
    """`F = mean_{i<T-1} (max_{t<T-1} R[t][i] - R[T-1][i])`: by how much each task fell below its best score.

    A value above 0 means forgetting. As in the source, the best is taken over all earlier stages, also over stages
    before the task's own. None where there is one task, or all were learned at once.

    Raises:
        DataError: R is no matrix of scores.
    """
    _check_matrix(R)
    last = len(R) - 1
    if last < 1:
        return None
    return mean(max(R[t][i] for t in range(last)) - R[last][i] for i in range(last))


def general_delta(g: Sequence[float]) -> float | None:
    """`G = g[-1] - g[0]`: by how much the stream changed the score of general ability, which is never trained.

    None where it was not measured.
    """
    return g[-1] - g[0] if len(g) > 1 else None


@dataclass(frozen=True, slots=True)
class Metrics:
    """All metrics of one stream; None where a metric is not defined.

    Attributes:
        op: overall performance, see `overall_performance`.
        bwt: backward transfer, see `backward_transfer`.
        fwt: forward transfer, see `forward_transfer`.
        forgetting: see `forgetting`.
        general_delta: change of the general score, see `general_delta`.
    """

    op: float
    bwt: float | None
    fwt: float | None
    forgetting: float | None
    general_delta: float | None

    @classmethod
    def of(cls, R: Matrix, b: Sequence[float], g: Sequence[float] = ()) -> Metrics:
        """Compute all metrics.

        Args:
            R: scores after each stage (rows) on each task (columns).
            b: scores of the untrained model on each task.
            g: general scores, the untrained model's first; empty where none was measured.

        Raises:
            DataError: R is no matrix of scores, or b has another length.
        """
        return cls(
            overall_performance(R), backward_transfer(R), forward_transfer(R, b), forgetting(R), general_delta(g)
        )


METRIC_LABELS = {"op": "OP", "bwt": "BWT", "fwt": "FWT", "forgetting": "forgetting", "general_delta": "general delta"}


def intervals(streams: Sequence[Metrics]) -> dict[str, Interval | None]:
    """The mean and 95 % interval of each metric over several streams (orders, seeds) of one strategy.

    None where no stream defines the metric.
    """
    found: dict[str, Interval | None] = {}
    rows = [asdict(stream) for stream in streams]
    for name in METRIC_LABELS:
        values = [row[name] for row in rows if row[name] is not None]
        found[name] = Interval.of(values) if values else None
    return found


def metrics_table(strategies: dict[str, Sequence[Metrics]]) -> str:
    """A table of `intervals`, one row for each strategy."""
    rows = []
    for name, streams in strategies.items():
        cells = ["-" if part is None else str(part) for part in intervals(streams).values()]
        rows.append([name, str(len(streams)), *cells])
    return format_table(["strategy", "streams", *METRIC_LABELS.values()], rows)


def _check_matrix(R: Matrix, b: Sequence[float] | None = None) -> None:
    width = len(R[0]) if R else 0
    square = len(R) in (1, width) and all(len(row) == width for row in R)
    if not width or not square or (b is not None and len(b) != width):
        shape = f"{len(R)} rows of {sorted({len(row) for row in R})}" + ("" if b is None else f", b of {len(b)}")
        raise DataError(
            "this is no matrix of scores",
            expected="T rows of T scores, or one row",
            got=shape,
            where="metrics",
            fix="give one row a task, each with a score of every task",
        )
