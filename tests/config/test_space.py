"""Search spaces, gate constants, budgets and schedules: what is accepted, what is refused and how."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import gatedadapters as ga
from gatedadapters.config import SearchConfig
from gatedadapters.config.space import presets
from gatedadapters.errors import ConfigError


@pytest.mark.parametrize("name", presets())
def test_every_preset_loads_under_its_own_name(name: str) -> None:
    space = ga.SearchSpace.load(name)
    assert space.name == name
    assert space.description
    assert ga.SearchSpace.parse(space.model_dump(mode="json"), where="round trip") == space


def test_the_promised_presets_are_there() -> None:
    promised = {"lora-all-linear", "encoder-mixed", "decoder-mixed", "attention-only", "tiny", "lora-scale"}
    assert promised <= set(presets())


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"attention-only.*lora-all-linear(.|\n)*no-such"):
        ga.SearchSpace.load("no-such")


def test_a_file_of_ones_own_loads_like_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"paths": [{"kind": "serial", "width": 4, "at": {"blocks": [-1]}}]}))
    assert ga.SearchSpace.load(file).paths[0].size == 4


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pathes": []}, "pathes"),
        ({"paths": []}, "paths"),
        ({"paths": [{"kind": "nonesuch"}]}, "known kinds"),
        ({"paths": [{"kind": "lora", "rang": 8}]}, "rang"),
        ({"paths": [{"kind": "lora", "rank": 0}]}, "rank"),
        ({"paths": [{"kind": "lora", "at": {"include": "("}}]}, "not a regular expression"),
        ({"gates": {"levels": ["rank", "rank"]}}, "levels"),
        ({"gates": {"init": 10.0}}, "init must lie"),
        ({"gates": {"temperature": 0}}, "temperature"),
        ({"version": 2}, "version"),
    ],
)
def test_a_wrong_space_names_the_key(change: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)expected:.*got:.*{named}.*where:.*test.*fix:"):
        ga.SearchSpace.parse({"paths": [{"kind": "lora"}], **change}, where="test")


@pytest.mark.parametrize("arguments", [{}, {"params": 5, "fraction": 0.5}, {"fraction": 1.5}, {"params": 0}])
def test_a_budget_is_exactly_one_positive_amount(arguments: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"params|fraction"):
        ga.Budget(**arguments)


def test_a_constructor_refuses_like_a_file_does_and_names_the_whole_key() -> None:
    with pytest.raises(ConfigError, match=r"(?s)expected:.*got:.*warmup <= ramp <= prune.*where: *Schedule\n.*fix:"):
        ga.Schedule(warmup=0.5)
    with pytest.raises(ConfigError, match=r"(?s)got:.*paths\.0\.rnk:.*where: *SearchSpace\n"):
        ga.SearchSpace(paths=[{"kind": "lora", "rnk": 3}])  # type: ignore[arg-type, list-item]
    with pytest.raises(ConfigError, match=r"(?s)got:.*budget\.fraction:.*got 2\).*where: *SearchConfig\n"):
        SearchConfig(model="m", tasks=[{"train": "t.csv"}], budget={"fraction": 2})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"got: *budget\.fraction:"):
        SearchConfig.parse({"model": "m", "tasks": [{"train": "t.csv"}], "budget": {"fraction": 2}}, where="test")


def test_the_penalty_ramps_from_nothing_to_all() -> None:
    schedule = ga.Schedule(warmup=0.2, ramp=0.6, prune=0.8)
    assert [schedule.pressure(x) for x in (0.0, 0.2, 0.4, 0.6, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    with pytest.raises(ValueError, match="warmup <= ramp <= prune"):
        ga.Schedule(warmup=0.5, ramp=0.4)
