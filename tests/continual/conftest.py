"""What all tests of this folder need."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


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
