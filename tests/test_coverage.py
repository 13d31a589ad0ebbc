"""Every weight matrix of every family is reached, and the document says what the script prints."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from benchmarks.costs import coverage
from gatedadapters.testing.backbones import FAMILIES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def rows() -> list[Any]:
    pytest.importorskip("peft")
    return list(coverage.measure())


def test_every_matrix_of_every_family_is_reached(rows: list[Any]) -> None:
    assert len(rows) == len(FAMILIES) >= 30
    assert {row.family: row.left for row in rows if row.ours != (row.matrices, row.elements) or row.left} == {}


def test_the_document_is_what_the_script_prints(rows: list[Any]) -> None:
    stored = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    if any(f"{name} {version(name)}" not in stored.replace("\n", " ") for name in ("peft", "transformers")):
        pytest.skip("the document was written with other releases")
    assert stored == coverage.table(rows)


def test_the_rule_for_matrices_does_not_lean_on_discovery() -> None:
    """Counted by hand: Mixtral's block has four attention maps, a router, and two matrices for each of four experts."""
    model, _ = coverage.tiny("mixtral")
    assert sum(count for count, _ in coverage.matrices(model).values()) == 2 * (4 + 1 + 2 * 4)
