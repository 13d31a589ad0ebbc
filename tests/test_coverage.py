"""Every weight matrix of every family is reached, and the document says what the script prints."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gatedadapters.testing.backbones import FAMILIES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("peft")
    spec = importlib.util.spec_from_file_location("coverage_table", ROOT / "benchmarks" / "coverage.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["coverage_table"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(script: ModuleType) -> list[Any]:
    return list(script.measure())


def test_every_matrix_of_every_family_is_reached(rows: list[Any]) -> None:
    assert len(rows) == len(FAMILIES) >= 30
    assert {row.family: row.left for row in rows if row.ours != (row.matrices, row.elements) or row.left} == {}


def test_the_document_is_what_the_script_prints(script: ModuleType, rows: list[Any]) -> None:
    stored = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    if any(f"{name} {version(name)}" not in stored.replace("\n", " ") for name in ("peft", "transformers")):
        pytest.skip("the document was written with other releases")
    assert stored == script.table(rows)


def test_the_rule_for_matrices_does_not_lean_on_discovery(script: ModuleType) -> None:
    """Counted by hand: Mixtral's block has four attention maps, a router, and two matrices for each of four experts."""
    model, _ = script.tiny("mixtral")
    assert sum(count for count, _ in script.matrices(model).values()) == 2 * (4 + 1 + 2 * 4)
