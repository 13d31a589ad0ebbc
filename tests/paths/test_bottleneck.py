"""Bottlenecks that normalise what they read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gatedadapters.paths import Point, Serial, Site
from gatedadapters.paths.bottleneck import SerialOptions

POINT = Point("norm", "input")
SITE = Site(POINT, POINT, 6, 6, "block", 0, "attention", "")


def serial(normalized: float | None) -> Serial:
    path = Serial(SITE, SerialOptions(width=3, normalized=normalized))
    with torch.no_grad():
        for parameter in path.parameters():
            parameter.normal_()
    return path


def adds(path: Serial, read: Tensor) -> Tensor:
    return torch.relu(read @ path.down.t() + path.bias) @ path.up.t()


def test_it_reads_what_a_layer_norm_returns_before_gains_and_shifts() -> None:
    path, hidden = serial(1e-5), torch.randn(2, 4, 6)
    normalised = F.layer_norm(hidden, (6,), eps=1e-5)
    torch.testing.assert_close(path(hidden, hidden, None), hidden + adds(path, normalised))


def test_one_that_normalises_and_one_that_does_not_share_a_point() -> None:
    plain, normal, hidden = serial(None), serial(1e-5), torch.randn(2, 4, 6)
    found = Serial.forward_together([plain, normal], hidden, hidden, [None, torch.tensor([0.5])])
    expected = hidden + adds(plain, hidden) + 0.5 * adds(normal, F.layer_norm(hidden, (6,), eps=1e-5))
    torch.testing.assert_close(found, expected)


def test_options_without_it_are_written_as_before() -> None:
    assert "normalized" not in SerialOptions(width=3).model_dump()
    assert SerialOptions(width=3, normalized=1e-5).model_dump()["normalized"] == 1e-5
