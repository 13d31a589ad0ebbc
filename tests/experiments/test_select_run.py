"""A selection from Python: what it returns, and how its texts are cut and split."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import gatedadapters as ga
from gatedadapters import experiments
from gatedadapters.config import CorpusConfig, SelectConfig
from gatedadapters.data.language import Passage, read_passages, split_passages
from gatedadapters.errors import DataError
from gatedadapters.experiments.run_select import load_passages


def test_a_selection_returns_its_report_and_its_mask(decoder: Path, tmp_path: Path) -> None:
    for name, word in (("general", "dog"), ("domain", "film")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"the {word} was very good {i}" for i in range(12)))
    data = {
        "model": str(decoder),
        "general": {"file": str(tmp_path / "general.txt")},
        "domain": {"file": str(tmp_path / "domain.txt")},
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


def test_a_corpus_is_cut_by_seed_not_to_its_first_texts(tmp_path: Path) -> None:
    (tmp_path / "sorted.txt").write_text("\n\n".join(f"text {i}" for i in range(40)))
    whole = read_passages(tmp_path / "sorted.txt")

    def used(count: int | None, seed: int) -> set[Passage]:
        corpus = CorpusConfig(file=str(tmp_path / "sorted.txt"), max_texts=count)
        return {passage for part in load_passages(corpus, seed) for passage in part}

    assert len(used(20, 0)) == 20
    assert used(20, 0) == used(20, 0) != used(20, 1)
    assert not used(20, 0) <= set(whole[:30])
    assert used(40, 0) == used(None, 0) == set(whole)


def test_texts_are_split_without_overlap_and_bad_files_are_refused(tmp_path: Path) -> None:
    passages = [Passage(f"text {i % 8}") for i in range(20)]
    train, held_out = split_passages(passages, 0.25, seed=0)
    assert (len(train), len(held_out)) == (6, 2)
    assert not set(train) & set(held_out)
    with pytest.raises(DataError, match="too little text"):
        split_passages(passages[:1], 0.5, seed=0)
    (tmp_path / "lines.TXT").write_text("one line\nand another\n")
    corpus = CorpusConfig(file=str(tmp_path / "lines.TXT"))
    with pytest.raises(DataError, match=r"(?s)too little text.*where: .*lines\.TXT.*fix: .*an empty line between"):
        load_passages(corpus, 0)
    (tmp_path / "empty.txt").write_text("\n\n")
    for name in ("empty.txt", "missing.txt", "missing.csv"):
        with pytest.raises(DataError):
            read_passages(tmp_path / name)
