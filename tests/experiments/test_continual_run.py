"""Streams from Python: what a run returns, which streams there are, and what they are made of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import gatedadapters as ga
from gatedadapters import experiments
from gatedadapters.config import ContinualConfig
from gatedadapters.errors import ConfigError
from gatedadapters.experiments import run_continual
from gatedadapters.experiments.streams import build_stream, stream_orders

TRAINING = {"steps": 2, "batch_size": 4, "max_length": 16, "learning_rate": 0.01, "device": "cpu"}


@pytest.fixture
def continual(tables: Path, encoder: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        animal = {"name": "animal", "train": "animal.jsonl", "text": "line", "label": "kind"}
        data = {
            "model": str(encoder),
            "tasks": [{"train": "mood.csv"}, animal],
            "strategy": "sequential",
            "training": TRAINING,
        }
        path = tables / "continual.yaml"
        path.write_text(yaml.safe_dump(data | changes))
        return path

    return write


def test_a_run_returns_every_stream_and_goes_on_from_its_own_folder(
    continual: Callable[..., Path], tmp_path: Path
) -> None:
    config = ContinualConfig.load(continual(compare=["lora"]))
    result = experiments.continual(config, out=tmp_path / "out")
    assert list(result.streams) == ["sequential", "lora"]
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["streams"] == {name: [streams[0].to_data()] for name, streams in result.streams.items()}
    assert (tmp_path / "out" / "table.txt").read_text() == result.table() + "\n"
    assert f"In {tmp_path / 'out'}:" in str(result)
    again = experiments.continual(config, out=tmp_path / "out")
    assert again.table() == result.table()


def test_a_random_core_has_the_elements_of_the_first_strategy_unless_it_has_a_size(
    continual: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    space = {"name": "small", "paths": [{"kind": "lora", "rank": 2}]}

    def run(model: Any, stream: Any, strategy: Any, **options: Any) -> ga.StreamResult:
        given[options["folder"].parent.name] = strategy
        stage = {
            "scores": [0.5, 0.5],
            "general": None,
            "tensors": None,
            "seconds": 0,
            "probe_seconds": 0,
            "evaluation_seconds": 0,
            "bytes": 0,
            "state": "",
        }
        return ga.StreamResult.of(
            {
                "record": {
                    "tasks": [{"name": "mood"}, {"name": "animal"}],
                    "general": None,
                    "strategy": {"kind": strategy.kind},
                    "training": {},
                    "seed": 0,
                    "keep": True,
                    "base": "",
                    "elements": 9,
                    "stages": 2,
                },
                "baseline": {"scores": [0.5, 0.5], "general": None},
                "stages": [{**stage, "task": "mood", "elements": 70}, {**stage, "task": "animal", "elements": 80}],
            }
        )

    monkeypatch.setattr(run_continual, "run_stream", run)
    compared = [
        "random",
        *({"kind": "random", "core": core} for core in ({"include": ["*.attention.*"]}, {"share": 0.2})),
        {"kind": "random", "elements": [3, 4]},
        {"kind": "random", "core": {"include": ["*.attention.self.key.bias"]}},
    ]
    config = ContinualConfig.load(continual(strategy={"kind": "gated", "space": space}, compare=compared))
    experiments.continual(config, tmp_path / "out")
    sizes = [strategy.elements for name, strategy in given.items() if name != "gated"]
    assert sizes == [(70, 80), (70, 80), None, (3, 4), None]  # the last has no 80 to choose from
    assert given["random-2"].core.include == ("*.attention.*",)


def test_orders_are_distinct_and_no_more_than_there_are(continual: Callable[..., Path]) -> None:
    config = ContinualConfig.load(continual(orders=2, seeds=[3, 4]))
    assert [(seed, order) for _, seed, order in stream_orders(config)] == [
        (3, [0, 1]),
        (3, [1, 0]),
        (4, [0, 1]),
        (4, [1, 0]),
    ]
    with pytest.raises(ConfigError, match="2 tasks have 2 orders"):
        ContinualConfig.load(continual(orders=3))


def test_a_table_of_questions_is_cut_by_seed_not_to_its_first_rows(decoder: Path, tmp_path: Path) -> None:
    rows = [f"the dog {answer},{answer}" for answer in ("runs", "sleeps") for _ in range(20)]
    for part in ("train", "test"):
        (tmp_path / f"{part}.csv").write_text("\n".join(["text,answer", *rows]))
    task = {
        "train": str(tmp_path / "train.csv"),
        "test": str(tmp_path / "test.csv"),
        "answer": "answer",
        "max_train": 12,
        "max_test": 8,
    }
    config = ContinualConfig.parse({"model": str(decoder), "tasks": [task], "strategy": "sequential"}, where="test")
    (found,) = build_stream(config, seed=0)[1]
    for data, count in ((found.train, 12), (found.held_out, 8)):
        assert len(data) == count
        assert len({tuple(item["input_ids"]) for item in data}) == 2
