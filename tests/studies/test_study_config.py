"""Study spaces: what is accepted, what is refused and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from made_up import FACTORS, SEARCH, config

from gatedadapters.config import SearchConfig, StudyConfig, TransferConfig
from gatedadapters.config.space import presets
from gatedadapters.config.study import Factor, changed, field_paths, study_presets, value_of
from gatedadapters.errors import ConfigError
from gatedadapters.studies.cells import cells, trainings

OPTIMISE = {"mode": "optimise", "factors": {"space": {"values": ["attention-only"]}}, "sides": {"gated": {}}}


@pytest.mark.parametrize("name", study_presets())
def test_every_study_preset_loads_under_its_own_name(name: str) -> None:
    found = StudyConfig.load(name)
    assert found.name == name
    assert found.description


def test_study_presets_are_apart_from_adapter_spaces() -> None:
    assert {"sensitivity", "optimise"} <= set(study_presets())
    assert not set(study_presets()) & set(presets())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"factors": {"sparsity": {"values": [1]}}}, "no such factor.*penalty.weight"),
        ({"factors": {"training.steps.more": {"values": [1]}}}, "no such factor"),
        ({"factors": {"training.seed": {"values": [1]}}}, "seeds"),
        ({"factors": {}}, "factors"),
        ({"factors": {"penalty.weight": {"low": 2, "high": 1}}}, "empty or inverted range"),
        ({"factors": {"penalty.weight": {"low": 1, "high": 1}}}, "empty or inverted range"),
        ({"factors": {"penalty.weight": {"low": 0, "high": 1, "log": True}}}, "above 0"),
        ({"factors": {"penalty.weight": {"low": 0}}}, "low < high"),
        ({"factors": {"penalty.weight": {}}}, "either values"),
        ({"factors": {"noise.ratio": {"values": []}}}, "values must be given"),
        ({"factors": {"noise.ratio": {"values": [0.1, 0.1]}}}, "each once"),
        ({"factors": {"noise.ratio": {"values": [0.0, 1.2]}}}, "noise.ratio.*less than or equal to 1"),
        ({"factors": {"perturbation.ratio": {"low": -0.1, "high": 0.3}}}, "greater than or equal to 0"),
        ({"factors": {"training.steps": {"values": [0]}}}, "training.steps"),
        ({"factors": {"penalty.weight": {"values": [1.0], "sides": ["uniform"]}}}, "only the gated side"),
        ({"factors": {"noise.ratio": {"values": [0.1], "sides": ["full"]}}}, "none of the sides"),
        ({"search": {**SEARCH, "noise": None}}, "noise.kind"),
        ({"seeds": [0, 0]}, "seeds must differ"),
        ({"mode": "optimise"}, "not to be tuned"),
        ({"mode": "optimise", "factors": {"noise.ratio": {"values": [0.1]}}}, "one side"),
        ({**OPTIMISE, "objectives": ["gap"]}, "robustness gap needs"),
        ({"search": "search.yaml"}, "StudyConfig.load"),
    ],
)
def test_a_wrong_study_names_what_is_wrong(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)(?=.*{named}).*expected:.*where:.*test"):
        config(**changes)


def test_uniform_lora_needs_a_budget_to_take_its_size_from() -> None:
    search = {**SEARCH, "penalty": {"weight": 1.0}}
    del search["budget"]
    with pytest.raises(ConfigError, match="size of the budget"):
        config(search=search)


def test_a_range_is_spaced_evenly_or_logarithmically() -> None:
    assert Factor(low=0.01, high=10, log=True, points=4).grid() == (0.01, 0.1, 1.0, 10.0)
    assert Factor(low=0, high=0.3, points=4).grid() == (0.0, 0.1, 0.2, 0.3)
    assert Factor(low=1, high=4, points=9, integer=True).grid() == (1, 2, 3, 4)


def test_a_search_is_changed_by_dotted_paths() -> None:
    search = SearchConfig.parse(SEARCH, where="test")
    found = changed(search, {"training.learning_rate": 0.5, "tasks.1.max_train": 7, "noise.ratio": 0.25})
    assert found.training.learning_rate == 0.5
    assert found.training.steps == 100
    assert [task.max_train for task in found.tasks] == [None, 7]
    assert value_of(found, "tasks.1.max_train") == 7
    weighted = changed(search, {"penalty.weight": 2.0})
    assert weighted.limit is None
    again = changed(weighted, {"budget.params": 500})
    assert again.penalty is None
    assert again.budget.params == 500
    assert changed(search, {"budget.flops": 1e6}).budget.fraction is None
    with pytest.raises(ConfigError, match="tasks"):
        changed(search, {"tasks.7.max_train": 3})


def test_every_field_of_a_search_can_be_a_factor() -> None:
    known = set(field_paths())
    assert {"penalty.weight", "noise.kind", "perturbation.ratio", "budget.fraction", "schedule.prune", "space"} <= known
    assert {"training.learning_rate", "tasks.N.max_train", "model"} <= known


def test_what_is_only_tested_is_not_trained_again() -> None:
    found = trainings(config())
    # gated: as it is, three weights, one noise; uniform: as it is, one noise; two seeds
    assert len(found) == 2 * (5 + 2)
    assert len({training.key for training in found}) == len(found)
    plain = [t for t in found if not t.cell.assignment]
    assert [[p.ratio for p in training.perturbations] for training in plain] == [[0.1, 0.3]] * 4
    assert all(not t.perturbations for t in found if t.cell.assignment)


def test_a_grid_crosses_everything_and_still_trains_each_setting_once() -> None:
    crossed = config(design="grid", factors={k: v for k, v in FACTORS.items() if k != "penalty.weight"})
    assert len(list(cells(crossed))) == 2 * 2 * 2 * 3
    assert len(trainings(crossed)) == 2 * 2 * 2
    assert all(len(training.perturbations) == 2 for training in trainings(crossed))


def test_a_study_survives_being_written(tmp_path: Path) -> None:
    search = {**SEARCH, "tasks": [{"train": str(tmp_path / "a.csv")}, {"bundled": "tweets"}]}
    before = config(search=search)
    (tmp_path / "study.yaml").write_text(before.to_yaml())
    assert StudyConfig.load(tmp_path / "study.yaml") == before


def test_a_study_may_point_to_a_search_beside_it(tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(SEARCH))
    data = {"name": "x", "factors": {"noise.ratio": {"values": [0.0, 0.1]}}, "search": "search.yaml"}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(data))
    found = StudyConfig.load(tmp_path / "study.yaml")
    assert found.search.tasks[0].train == str(tmp_path / "a.csv")
    other = SearchConfig.parse({**SEARCH, "model": "other"}, where="test")
    assert StudyConfig.load(tmp_path / "study.yaml", search=other).search.model == "other"
    with pytest.raises(ConfigError, match="sensitivity"):
        StudyConfig.load("no-such")


def test_a_search_is_held_down_by_a_budget_or_a_penalty() -> None:
    assert SearchConfig.parse(SEARCH, where="test").limit is not None
    with pytest.raises(ConfigError, match="either a budget or a penalty"):
        SearchConfig.parse({**SEARCH, "penalty": {"weight": 1.0}}, where="test")


@pytest.mark.parametrize("field", ["noise", "perturbation"])
def test_a_transfer_refuses_what_it_would_ignore(field: str) -> None:
    data = {"model": "a", "update": "b", "tasks": [{"train": "a.csv"}], field: {"kind": "typos", "ratio": 0.1}}
    with pytest.raises(ConfigError, match="not to a transfer"):
        TransferConfig.parse(data, where="test")
