"""What all tests of this folder need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from streams import RESUMED, classifier, options, tasks

import gatedadapters as ga
from gatedadapters.continual.result import StreamResult


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, StreamResult]]:
    """Streams that were never stopped, one per strategy: the model afterwards, and the result."""
    found: dict[str, tuple[Any, StreamResult]] = {}

    def get(kind: str) -> tuple[Any, StreamResult]:
        if kind not in found:
            model = classifier()
            folder = tmp_path_factory.mktemp(kind) / "stream"
            found[kind] = model, ga.run_stream(model, tasks(), options(kind), training=RESUMED, folder=folder)
        return found[kind]

    return get
