"""The arithmetic of the transfer study: what is paired with what, and in which order cells are computed."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("transfer_study", ROOT / "benchmarks" / "transfer.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["transfer_study"] = module
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "STORE", tmp_path)
    return module


def fill(study: ModuleType, variant: str, seed: int, base: str = "old", **scores: float) -> None:
    cell = study.cell_of(study.ENCODER, "tweets", variant, seed, base)
    results: dict[str, Any] = {name: {"accuracy": value, "loss": 1.0} for name, value in scores.items()}
    cell.file.write_text(json.dumps({**results, "params": 7}))


def test_differences_are_paired_by_seed_and_recovery_needs_a_gap(study: ModuleType) -> None:
    for seed in range(4):
        shift = 0.1 * seed
        fill(study, "vanilla", seed, old=0.5 + shift, direct=0.3 + shift)
        fill(study, "vanilla", seed, "new", new=0.5 + shift)
        if seed:  # a seed of the other arm is missing: it must not enter the pairs
            fill(study, "transfer", seed, old=0.49 + shift, direct=0.35 + shift)
    table = study.arms_table(study.ENCODER, ("tweets",), study.SEEDS)
    row = next(line for line in table.splitlines() if line.startswith("tweets  transfer"))
    shown = "3 69.0 ± 24.8 55.0 ± 24.8 vanilla +5.0 ± 0.0 -1.0 ± 0.0 25% (25% to 25%) 7"
    assert row.split()[2:] == shown.split()


def test_weakened_searches_are_compared_with_plain_ones_and_few_re_tuned_seeds_counted(study: ModuleType) -> None:
    for seed in range(3):
        fill(study, "vanilla", seed, old=0.9, direct=0.9)
        fill(study, "gated", seed, old=0.6, direct=0.4)
        fill(study, "gated + transfer", seed, old=0.5, direct=0.5)
        if seed < 2:
            fill(study, "gated", seed, "new", new=0.8)
    table = study.arms_table(study.ENCODER, ("tweets",), study.SEEDS)
    rows = {" ".join(line.split()[1:4]): line for line in table.splitlines()}
    assert "80.0 ± 0.0 (2)" in rows["gated 3 60.0"]
    assert "gated +10.0 ± 0.0 -10.0 ± 0.0 25% (25% to 25%)" in " ".join(rows["gated + transfer"].split())


def test_every_cell_has_a_file_of_its_own_and_what_decides_comes_first(study: ModuleType) -> None:
    cells = list(dict.fromkeys(study.cells()))
    assert len({cell.file for cell in cells}) == len(cells)
    assert {cell.arm for cell in cells[:9]} == {"uniform"}
    assert {(cell.mask, cell.drop) for cell in cells if cell.task == study.SWEEP_TASK} >= {
        (mask, drop) for mask in study.MASKS for drop in study.DROPS
    }
    variants = {(cell.task, cell.arm, cell.drop, cell.base) for cell in cells if cell.setting == "minilm"}
    for task in study.TASKS:
        for arm, drop, _ in study.VARIANTS.values():
            assert {(task, arm, drop, base) for base in ("old", "new")} <= variants
