"""What all tests of this folder need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from streams import strategy

from gatedadapters.continual import Stage, StreamResult
from gatedadapters.testing.strategy_contract import finished_stream


@pytest.fixture(scope="session")
def finished() -> Callable[[str], tuple[Any, StreamResult]]:
    """Streams that were never stopped, one per strategy: the model afterwards, and the result."""

    def get(kind: str) -> tuple[Any, StreamResult]:
        found = finished_stream(strategy(kind))
        return found.model, found.result

    return get


@pytest.fixture
def untrained(finished: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of streams take no step of training; probes do."""
    finished("l2_fisher")  # is remembered, so it has to be trained before
    monkeypatch.setattr(Stage, "fit", lambda *args, **kwargs: 0.0)
