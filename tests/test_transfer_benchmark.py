"""The arithmetic of the transfer study: what is paired with what, and in which order cells are computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from benchmarks.studies.transfer import cells as study
from benchmarks.studies.transfer.carry import CarryCell, arms, carry_cells, damage_cells
from benchmarks.studies.transfer.carry_table import rank_correlation, repairs_table
from benchmarks.studies.transfer.problems import DECODER, ENCODER
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


def carried(update: str, seed: int, **losses: float) -> None:
    for arm, loss in losses.items():
        if arm != "old":
            cell = CarryCell("minilm", "tweets", "lora", update, seed, arm)
            scores = {"new": {"loss": loss, "accuracy": 0.5}, "old": {"loss": losses["old"], "accuracy": 0.6}}
            study.STORE.write(cell.name, {"cell": {}, **scores})


def test_recovered_is_the_share_of_training_anew_in_loss_paired_by_seed() -> None:
    for seed in range(3):
        carried("real", seed, old=0.5, direct=1.0 + seed, anew=0.6 + seed, **{"repaired 10%": 0.7 + seed})
    lines = repairs_table().splitlines()
    assert next(line for line in lines if "repaired, 10% of the steps" in line).endswith("75% (75% to 75%)")
    assert "without labels" not in repairs_table()
    assert "3  1.600 ± 2.484" in next(line for line in lines if "trained anew" in line)
    assert "0.500 ± 0.000  60.0 ± 0.0" in next(line for line in lines if "old base" in line)


def test_one_seed_is_shown_without_an_interval_and_a_seed_without_its_pair_left_out() -> None:
    carried("real", 0, old=0.5, direct=1.0, anew=0.6, masking=1.2, **{"repaired 5%": 0.9})
    carried("real", 1, old=0.5, **{"repaired 5%": 0.1})
    lines = repairs_table().splitlines()
    assert next(line for line in lines if "repaired, 5%" in line).endswith("25%")
    assert next(line for line in lines if "trained with masking" in line).endswith("-50%")


def test_rank_correlation_is_spearmans() -> None:
    a, b = [0.1, 0.5, 0.2, 0.9, 0.3], [1.0, 2.0, 4.0, 5.0, 3.0]
    assert rank_correlation(a, b) == pytest.approx(float(stats.spearmanr(a, b).statistic))


def test_cells_of_repairs_differ_by_name_and_the_real_update_comes_first() -> None:
    cells = list(dict.fromkeys(carry_cells()))
    assert len({cell.name for cell in cells}) == len(cells)
    assert [cell.arm for cell in cells[:3]] == ["direct", "anew", "repaired 10%"]
    assert {(cell.update, cell.seed) for cell in cells[: len(ENCODER.tasks) * len(arms())]} == {("real", 0)}
    assert {cell.update for cell in cells if cell.arm == "anew"} == {"real", *DECODER.updates}
    assert len(set(damage_cells())) >= 12
