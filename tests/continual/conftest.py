"""What all tests of this folder need."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from streams import RESUMED, classifier, options, tasks

import gatedadapters as ga
from gatedadapters.continual.result import StreamResult


@pytest.fixture(autouse=True, scope="session")
def _quick_collections() -> Iterator[None]:
    """Every Trainer collects garbage three times as it starts, which takes most of a tiny run: of what is imported by
    then there is none.
    """
    import transformers

    assert transformers.Trainer
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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
