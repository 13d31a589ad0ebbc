"""The benchmarks' own arithmetic, and that the documents show what they print."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))  # scripts share modules


def script(name: str) -> ModuleType:
    pytest.importorskip("peft")
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return script("search_quality")


def store(quality: ModuleType, cell: Any, score: float) -> None:
    cell.file.parent.mkdir(parents=True, exist_ok=True)
    cell.file.write_text(json.dumps({"score": score, "params": 10}))


def test_interval_is_that_of_a_paired_t_test() -> None:
    cells = script("cells")
    differences = np.array([0.01, -0.02, 0.03, 0.005, 0.015])
    mean, half = cells.interval(differences)
    oracle = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((oracle.low, oracle.high))


def test_rate_is_tuned_on_validation_alone_and_only_once_all_rates_are_known(
    quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "STORE", tmp_path)
    cells = [
        quality.Cell("tweets", 1 / 8, "uniform", rate, quality.TUNING_SEED, split="validation")
        for rate in quality.RATES
    ]
    store(quality, cells[0], 0.7)
    assert quality.tuned_rate("tweets", 1 / 8, "uniform", compute_missing=False) is None
    for cell in cells[1:]:
        store(quality, cell, 0.6)
    store(quality, quality.Cell("tweets", 1 / 8, "uniform", quality.RATES[1], 0), 0.99)  # a test score must not count
    assert quality.tuned_rate("tweets", 1 / 8, "uniform", compute_missing=False) == quality.RATES[0]
    assert quality.TUNING_SEED not in quality.SEEDS


def test_stored_cells_are_not_computed_again(
    quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "STORE", tmp_path)
    computed = []
    monkeypatch.setattr(quality, "compute", lambda cell, arm: computed.append(cell) or {"score": 0.5, "params": 1})
    cell = quality.Cell("tweets", 1 / 8, "uniform", 3e-3, 0)
    assert quality.run(cell)["score"] == 0.5
    assert quality.run(cell)["score"] == 0.5
    assert computed == [cell]
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_table_pairs_seeds(quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "STORE", tmp_path)
    monkeypatch.setattr(quality, "STUDIES", (quality.Study("tweets", 1 / 8, ("searched", "random")),))
    for arm in ("searched", "random"):
        for rate in quality.RATES:
            store(quality, quality.Cell("tweets", 1 / 8, arm, rate, quality.TUNING_SEED, split="validation"), 1 - rate)
    best = min(quality.RATES)
    for seed in quality.SEEDS:
        store(quality, quality.Cell("tweets", 1 / 8, "searched", best, seed), 0.5 + 0.1 * seed + 0.02)
        if seed:  # one seed of the control is still missing: it must not enter the pairs
            store(quality, quality.Cell("tweets", 1 / 8, "random", best, seed), 0.5 + 0.1 * seed)
    row = next(line for line in quality.table().splitlines() if "| random |" in line)
    assert "| 4 |" in row
    assert "+2.0 ± 0.0" in row


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("search_quality", lambda s: [s.table(), s.compression()]),
        ("forgetting", lambda s: [s.table()]),
        ("continual", lambda s: [*map(s.table, s.STUDIES), s.overlaps()]),
        ("transfer", lambda s: [s.table()]),
    ],
)
def test_results_show_the_tables_of_the_stored_cells(name: str, tables: Callable[[Any], list[str]]) -> None:
    shown = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    lines = [line.rstrip() for table in tables(script(name)) for line in table.splitlines()]
    assert len(lines) > 3
    assert [line for line in lines if line not in shown] == []


def test_readme_names_no_figure_that_the_results_do_not_show() -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    _, _, measured = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What was measured")
    measured, _, _ = measured.partition("\n## ")
    claims = re.findall(r"\(docs/results.md#([a-z-]+)\)(.*)", measured)
    assert len(claims) == results.count("\n## ")
    for anchor, figures in claims:
        section = next(s for s in results.split("\n## ") if s.partition("\n")[0].lower().replace(" ", "-") == anchor)
        numbers = re.findall(r"\d+\.\d+(?: ± \d+\.\d+)?", figures)
        assert [n for n in numbers if n not in section] == []


def test_overlap_of_carried_cores_counts_elements() -> None:
    jaccard = script("continual").jaccard
    assert jaccard({"a": 4, "b": 6}, {"a": 4, "c": 2}) == 4 / 12
    assert jaccard({"a": 4, "b": 6}, {"a": 1}) == 1 / 10  # a random core may hold a part of a tensor


def test_inference_cost_says_whether_each_claim_holds() -> None:
    cost = script("inference_cost")
    row = {"model": "m", "precision": "fp32", "cpu_seconds": {"unmerged": 0.5}}
    ratio = dict.fromkeys(cost.RATIOS, 1.0)
    assert "NOT" not in cost.table([{**row, "ratio": ratio}])
    worse = cost.table([{**row, "ratio": {**ratio, "unmerged / peft": 1.01, "merged / backbone": 0.9}}])
    assert "peft's: does NOT hold, 1.01" in worse
    assert "backbone: does NOT hold, within 10.0%" in worse


@pytest.fixture
def compression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark of compressed LoRAs with a store of its own: rates chosen, gated 2 points above truncation."""
    module = script("compress_lora")
    monkeypatch.setattr(module, "STORE", tmp_path)
    for task in module.TASKS:
        for arm in module.TUNED:
            for rate in module.RATES:
                store(module, module.Cell(task, arm, 1 / 8, module.TUNING_SEED, rate, "validation"), 1 - rate)
    best = min(module.RATES)
    for seed in module.SEEDS:
        store(module, module.Cell("newsgroups", "gated", 1 / 8, seed, best), 0.5 + 0.1 * seed)
        store(module, module.Cell("newsgroups", "svd-tuned", 1 / 8, seed, 1e9), 0.0)  # at another rate: not counted
        if seed:  # one seed of the rival is still missing: it must not enter the pairs
            store(module, module.Cell("newsgroups", "svd", 1 / 8, seed), 0.48 + 0.1 * seed)
    return module


def test_compressed_loras_are_compared_seed_by_seed_at_one_size(compression: ModuleType) -> None:
    lines = compression.table().splitlines()
    (row,) = [line for line in lines if "| svd |" in line and "newsgroups" in line]
    assert "| 1/8 |" in row
    assert "| 4 | 73.0 | +2.0 ± 0.0 |" in row
    assert not [line for line in lines if "svd-tuned" in line]
    assert [line for line in lines if line.startswith("| all | | svd | | 4 pairs")]


def test_every_arm_of_a_compressed_lora_gets_the_same_seeds_sizes_and_steps(compression: ModuleType) -> None:
    cells = compression.study("newsgroups", compute_missing=False)
    by_arm = {arm: {(c.seed, c.share) for c in cells if c.arm == arm} for arm in compression.ARMS if arm != "whole"}
    assert set(map(frozenset, by_arm.values())) == {
        frozenset((seed, share) for seed in compression.SEEDS for share in compression.SHARES)
    }
    assert len(compression.SEEDS) >= 5
    assert compression.TUNING_SEED not in compression.SEEDS
