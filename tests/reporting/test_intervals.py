"""Intervals are those of Student, by scipy."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from gatedadapters.reporting.intervals import Interval, half_width, t_quantile


@pytest.mark.parametrize("degrees", [*range(1, 15), 30, 45, 200, 5000])
def test_quantile_is_student_s(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)


def test_interval_is_student_s() -> None:
    values = [0.71, 0.75, 0.69, 0.8]
    found = Interval.of(values)
    oracle = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert found.half is not None
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((oracle.low, oracle.high), rel=1e-9)
    assert found.text(signed=True) == f"+{found}" == f"+0.738 ± {found.half:.3f}"


def test_a_single_value_has_no_interval() -> None:
    assert Interval.of([0.5]).half is None
    assert str(Interval.of([0.5])) == "0.500"
    assert math.isnan(half_width([0.5]))
