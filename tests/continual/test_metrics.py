"""Metrics of a stream, on cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gatedadapters.continual import Metrics, intervals, metrics_table
from gatedadapters.errors import DataError
from gatedadapters.reporting.intervals import Interval

R = [[0.9, 0.3, 0.2], [0.7, 0.8, 0.4], [0.6, 0.9, 0.7]]
BASELINE = [0.1, 0.2, 0.3]


def test_golden_case() -> None:
    found = Metrics.of(R, BASELINE, [0.5, 0.45, 0.4, 0.42])
    assert found.op == pytest.approx((0.6 + 0.9 + 0.7) / 3)
    assert found.bwt == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)
    assert found.fwt == pytest.approx(((0.3 - 0.2) + (0.4 - 0.3)) / 2)
    assert found.forgetting == pytest.approx(((0.9 - 0.6) + (0.8 - 0.9)) / 2)
    assert found.general_delta == pytest.approx(0.42 - 0.5)


def test_forgetting_counts_from_the_best_score_of_all_earlier_stages() -> None:
    """As Chaudhry et al. define it, a best before the task's own training included."""
    early_best = [[0.5, 0.9, 0.1], [0.7, 0.6, 0.1], [0.4, 0.5, 0.8]]  # 0.9 on the second task came before its training
    assert Metrics.of(early_best, BASELINE).forgetting == pytest.approx(((0.7 - 0.4) + (0.9 - 0.5)) / 2)


def test_forgetting_is_at_least_minus_backward_transfer() -> None:
    for seed in range(20):
        matrix = np.random.default_rng(seed).random((4, 4)).tolist()
        found = Metrics.of(matrix, [0.0] * 4)
        assert found.forgetting is not None
        assert found.bwt is not None
        assert found.forgetting >= -found.bwt - 1e-12


def test_what_all_tasks_at_once_or_one_task_do_not_define_is_none() -> None:
    for found in (Metrics.of([R[2]], BASELINE), Metrics.of([[0.5]], [0.4])):
        assert (found.bwt, found.fwt, found.forgetting, found.general_delta) == (None, None, None, None)
        assert found.op > 0


@pytest.mark.parametrize("matrix", [[], [[0.1, 0.2], [0.3]], [[0.1, 0.2, 0.3], [0.1, 0.2, 0.3]]])
def test_a_matrix_of_another_shape_is_refused(matrix: list[list[float]]) -> None:
    with pytest.raises(DataError, match="no matrix of scores"):
        Metrics.of(matrix, BASELINE)


def test_a_metric_that_no_stream_has_gets_no_interval() -> None:
    values = [0.71, 0.75, 0.69, 0.8]
    streams = [Metrics(value, None, 0.0, 0.1, None) for value in values]
    assert intervals(streams)["op"] == Interval.of(values)
    assert intervals(streams)["bwt"] is None
    assert "0.738 ± 0.0" in metrics_table({"some": streams})
