"""A search from Python: its result, its folder, the rivals it is compared with."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm
from transformers import AutoModel

import gatedadapters as ga
from gatedadapters import experiments
from gatedadapters.config import SearchConfig
from gatedadapters.errors import ArtifactError
from gatedadapters.experiments.arms import ArmRunner
from gatedadapters.experiments.rivals import uniform_scores, uniform_space
from gatedadapters.experiments.sides import trained_side
from gatedadapters.experiments.task_models import load_tasks

Configured = Callable[..., Path]


def test_a_search_returns_what_its_folder_holds(configured: Configured, tables: Path) -> None:
    config = SearchConfig.load(configured(compare=["random"], training={"steps": 3, "batch_size": 4, "device": "cpu"}))
    result = experiments.search(config, out=tables / "out")
    assert (result.config, result.folder) == (config, tables / "out")
    assert [arm.name for arm in result.arms] == ["searched", "random structure"]
    metrics = json.loads((tables / "out" / "metrics.json").read_text())
    assert metrics | json.loads(json.dumps(result.to_data())) == metrics
    assert (tables / "out" / "table.txt").read_text() == result.table() + "\n"
    assert ga.Structure.load(tables / "out" / "adapter") == result.arms[0].structure
    text = str(result)
    for part in (result.table(), str(result.arms[0].structure), f"In {tables / 'out'}:", "used by mood"):
        assert part in text
    with pytest.raises(FrozenInstanceError):
        result.seconds = 0.0  # type: ignore[misc]
    with pytest.raises(ArtifactError, match="not empty"):
        experiments.search(config, out=tables / "out")
    again = experiments.search(config, out=tables / "out", overwrite=True)
    assert again.arms[0].accuracy == result.arms[0].accuracy


def test_a_search_takes_its_folder_from_the_name_of_its_file(
    configured: Configured, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = configured(training={"steps": 2, "batch_size": 4, "precision": "fp32", "device": "cpu"})
    (tables / "elsewhere").mkdir()
    monkeypatch.chdir(tables / "elsewhere")
    result = experiments.search(str(file))
    assert result.folder == Path("search")
    assert (tables / "elsewhere" / "search" / "metrics.json").is_file()


def test_uniform_lora_gives_every_map_its_rank_before_any_gets_more(encoder: Path) -> None:
    model = AutoModel.from_pretrained(encoder)
    each = 4 * 64 + 2 * 80  # parameters of one rank at the maps of one layer
    for size, ranks in ((2 * each, {1}), (5 * each, {2, 3}), (23 * each, {11, 12})):
        gated = ga.attach(model, uniform_space(model, size))
        structure = gated.discretize(ga.Budget(params=size), scores=uniform_scores(gated))
        ga.detach(model)
        assert 0.9 * size < structure.params <= size
        assert len(structure.paths) == 12
        assert {len(path.kept) for path in structure.paths} == ranks


def test_sorted_tables_are_cut_to_examples_of_every_class(tables: Path, configured: Configured) -> None:
    for part in ("train", "test"):
        lines = [f"{label} text {i} of {part},{label}" for label in ("happy", "sad") for i in range(30)]
        (tables / f"{part}.csv").write_text("\n".join(["text,label", *lines]))
    task = {"train": "train.csv", "validation": "test.csv", "test": "test.csv", "max_train": 20, "max_test": 10}
    (loaded,) = load_tasks(SearchConfig.load(configured(tasks=[task])))
    assert Counter(loaded.train.labels) == {0: 10, 1: 10}
    assert Counter(loaded.split("test").labels) == {0: 5, 1: 5}


def test_sides_start_from_the_same_heads_and_leave_the_model_as_it_was(configured: Configured) -> None:
    path = configured(
        space="lora-all-linear",
        schedule={"warmup": 0.0, "ramp": 0.25, "prune": 0.7},
        training={"steps": 8, "batch_size": 4, "gate_learning_rate": 3.0, "precision": "fp32", "device": "cpu"},
    )
    config = SearchConfig.load(path)
    runner = ArmRunner(config, load_tasks(config), None)
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    for side in ("full", "gated", "uniform", "full"):
        with tqdm(file=io.StringIO()) as bar, trained_side(runner, side, bar) as trained:  # type: ignore[arg-type]
            now = runner.model.state_dict()
            moved = [name for name in before if name in now and not torch.equal(before[name], now[name])]
            assert any(name.startswith("heads.") for name in moved)
            assert any(name.startswith("backbone.") for name in moved) == (side == "full")
            assert trained.params > 0
        after = runner.model.state_dict()
        assert after.keys() == before.keys()
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert not [name for name in changed if name.startswith("backbone.") or side == "full"]
