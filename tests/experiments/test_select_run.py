"""A selection from Python: what it returns, and how its texts are cut and split."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import gatedadapters as ga
from gatedadapters import experiments
from gatedadapters.config import SelectConfig


def test_a_selection_returns_its_report_and_its_mask(decoder: Path, tmp_path: Path) -> None:
    for name, word in (("general", "dog"), ("domain", "film")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"the {word} was very good {i}" for i in range(12)))
    data = {
        "model": str(decoder),
        "general": {"train": str(tmp_path / "general.txt")},
        "domain": {"train": str(tmp_path / "domain.txt")},
        "selection": {"batches": 2},
        "training": {"steps": 2, "batch_size": 4, "max_length": 16, "device": "cpu"},
    }
    result = experiments.select(SelectConfig.parse(data, where="test"), out=tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["before"], metrics["after"]) == (result.report.before, result.report.after)
    assert metrics["free"] == result.report.free == result.mask.count()
    assert (tmp_path / "out" / "report.txt").read_text() == f"{result.table()}\n\n{result.mask}\n"
    model = AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    assert ga.load_delta(model, tmp_path / "out" / "delta").mask == result.mask
    assert str(result) == result.table()
