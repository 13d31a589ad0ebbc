"""The arithmetic of the transfer study: what is paired with what, and in which order cells are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.studies.transfer import cells as study
from benchmarks.studies.transfer.table import arms_table


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study.STORE, "root", tmp_path)


def fill(variant: str, seed: int, base: str = "old", **scores: float) -> None:
    cell = study.cell_of(study.ENCODER, "tweets", variant, seed, base)
    results: dict[str, Any] = {name: {"accuracy": value, "loss": 1.0} for name, value in scores.items()}
    study.STORE.write(cell.name, {**results, "params": 7})


def test_differences_are_paired_by_seed_and_recovery_needs_a_gap() -> None:
    for seed in range(4):
        shift = 0.1 * seed
        fill("vanilla", seed, old=0.5 + shift, direct=0.3 + shift)
        fill("vanilla", seed, "new", new=0.5 + shift)
        if seed:  # a seed of the other arm is missing: it must not enter the pairs
            fill("transfer", seed, old=0.49 + shift, direct=0.35 + shift)
    table = arms_table(study.ENCODER, ("tweets",), study.SEEDS)
    row = next(line for line in table.splitlines() if line.startswith("tweets  transfer"))
    shown = "3 69.0 ± 24.8 55.0 ± 24.8 vanilla +5.0 ± 0.0 -1.0 ± 0.0 25% (25% to 25%) 7"
    assert row.split()[2:] == shown.split()


def test_weakened_searches_are_compared_with_plain_ones_and_few_re_tuned_seeds_counted() -> None:
    for seed in range(3):
        fill("vanilla", seed, old=0.9, direct=0.9)
        fill("gated", seed, old=0.6, direct=0.4)
        fill("gated + transfer", seed, old=0.5, direct=0.5)
        if seed < 2:
            fill("gated", seed, "new", new=0.8)
    table = arms_table(study.ENCODER, ("tweets",), study.SEEDS)
    rows = {" ".join(line.split()[1:4]): line for line in table.splitlines()}
    assert "80.0 ± 0.0 (2)" in rows["gated 3 60.0"]
    assert "gated +10.0 ± 0.0 -10.0 ± 0.0 25% (25% to 25%)" in " ".join(rows["gated + transfer"].split())


def test_every_cell_has_a_name_of_its_own_and_what_decides_comes_first() -> None:
    cells = list(dict.fromkeys(study.cells()))
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.arm for cell in cells[:9]} == {"uniform"}
    assert {(cell.mask, cell.drop) for cell in cells if cell.task == study.SWEEP_TASK} >= {
        (mask, drop) for mask in study.MASKS for drop in study.DROPS
    }
    variants = {(cell.task, cell.arm, cell.drop, cell.base) for cell in cells if cell.setting == "minilm"}
    for task in study.TASKS:
        for arm, drop, _ in study.VARIANTS.values():
            assert {(task, arm, drop, base) for base in ("old", "new")} <= variants
