"""A real PostgreSQL server of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.common.postgresql import binaries, running_server


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a server for the tests; skips where there is none."""
    pytest.importorskip("psycopg", reason="no driver: pip install gatedadapters[postgresql]")
    if binaries() is None:
        pytest.skip("no PostgreSQL server is installed here: apt-get install postgresql")
    with running_server() as url:
        yield url
