"""Configurations refuse what they would ignore, and say the same wherever their files lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gatedadapters.config import ContinualConfig, SearchConfig, SelectConfig, StudyConfig, TransferConfig
from gatedadapters.config.base import Config
from gatedadapters.config.study import value_of
from gatedadapters.errors import ConfigError
from gatedadapters.studies.cells import trainings

EXAMPLES = Path(__file__).parents[2] / "examples"
SEARCH = {"model": "base", "tasks": [{"train": "a.csv"}]}
SELECT = {"model": "base", "general": {"train": "a.txt"}, "domain": {"train": "b.txt"}}
STUDY = {
    "name": "x",
    "search": {**SEARCH, "noise": {"kind": "label", "ratio": 0}},
    "factors": {"noise.ratio": {"values": [0.1]}},
}
TRANSFER = {**SEARCH, "update": "new"}


@pytest.mark.parametrize(
    ("kind", "data", "named"),
    [
        (SearchConfig, {**SEARCH, "tasks": [{"bundled": "r8", "test": "a.csv"}]}, "leave test out"),
        (
            SearchConfig,
            {**SEARCH, "tasks": [{"bundled": "r8", "text": "review", "label": "y"}]},
            "leave label, text out",
        ),
        (SearchConfig, {**SEARCH, "noise": {"kind": "label"}}, "noise.ratio"),
        (SearchConfig, {**SEARCH, "perturbation": {"kind": "typos"}}, "perturbation.ratio"),
        (SelectConfig, {**SELECT, "domain": {"train": "faq.TXT", "answer": "reply"}}, "leave answer out"),
        (SelectConfig, {**SELECT, "domain": {"bundled": "xsum", "text": "body"}}, "leave text out"),
        (TransferConfig, {**TRANSFER, "budget": {"fraction": 0.05}}, "budget.*without search: true"),
        (TransferConfig, {**TRANSFER, "schedule": {"prune": 0.2}}, "schedule.*without search: true"),
        (TransferConfig, {**TRANSFER, "adapter": "saved", "space": "encoder-mixed"}, "either a space or an adapter"),
        (ContinualConfig, {**SEARCH, "training": {"seed": 7}}, "give seeds"),
        (StudyConfig, {**STUDY, "trials": 5, "constraints": {"params": 100}}, "no constraints, trials.*mode: optimise"),
        (StudyConfig, {**STUDY, "mode": "optimise", "design": "grid"}, "no design.*mode: sensitivity"),
    ],
)
def test_what_would_be_ignored_is_refused(kind: type[Config], data: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){named}"):
        kind.parse(data, where="test")


@pytest.mark.parametrize("preset", ["sensitivity", "optimise"])
def test_a_preset_studies_any_search_and_brings_its_noise_along(preset: str) -> None:
    given = SearchConfig.load(EXAMPLES / "search.yaml")
    found = StudyConfig.load(preset, search=given, name="mine")
    assert (found.name, found.search.tasks) == ("mine", given.tasks)
    own = StudyConfig.load(preset).search
    assert (found.search.noise, found.search.perturbation) == (own.noise, own.perturbation)
    kept = SearchConfig.parse({**SEARCH, "perturbation": {"kind": "word_swap", "ratio": 0.3}}, where="test")
    assert StudyConfig.load(preset, search=kept).search.perturbation == kept.perturbation


def test_an_error_inside_another_is_told_once() -> None:
    with pytest.raises(ConfigError) as refused:
        StudyConfig.parse({**STUDY, "factors": {"training.steps": {"values": [0]}}}, where="study.yaml")
    assert refused.value.where == "study.yaml: training.steps = 0"
    assert str(refused.value).count("expected:") == 1


def written(folder: Path) -> StudyConfig:
    """A study, its search and its data in a folder."""
    folder.mkdir()
    for name in ("a.csv", "b.csv"):
        (folder / name).touch()
    (folder / "base").mkdir()
    (folder / "search.yaml").write_text(yaml.safe_dump({**SEARCH, "space": "mine.yaml"}))
    factors = {"tasks.0.train": {"values": ["a.csv", "b.csv"]}}
    (folder / "study.yaml").write_text(yaml.safe_dump({"name": "x", "search": "search.yaml", "factors": factors}))
    return StudyConfig.load(folder / "study.yaml")


def test_a_study_is_the_same_wherever_its_folder_lies(tmp_path: Path) -> None:
    one, other = written(tmp_path / "alice"), written(tmp_path / "bob")
    assert one.search != other.search
    assert one.as_written() == other.as_written()
    assert str(tmp_path) not in str(one.as_written())
    assert [t.key for t in trainings(one)] == [t.key for t in trainings(other)]
    assert len({t.key for t in trainings(one)}) == len(one.seeds) * 2
    read = {t.cell.search.tasks[0].train for t in trainings(one)}
    assert read == {str(tmp_path / "alice" / name) for name in ("a.csv", "b.csv")}
    assert value_of(one.search, "tasks.0.train") == "a.csv"


def test_a_configuration_written_elsewhere_names_the_same_files(tmp_path: Path) -> None:
    search = written(tmp_path / "alice").search
    out = tmp_path / "alice" / "results" / "first"
    out.mkdir(parents=True)
    text = search.to_yaml(out)
    assert "../../a.csv" in text
    (out / "search.yaml").write_text(text)
    again = SearchConfig.load(out / "search.yaml")
    assert [Path(str(t.train)).resolve() for t in again.tasks] == [tmp_path / "alice" / "a.csv"]
    assert Path(again.model).resolve() == tmp_path / "alice" / "base"
    (tmp_path / "linked").symlink_to(out, target_is_directory=True)
    (out / "linked.yaml").write_text(search.to_yaml(tmp_path / "linked"))
    linked = SearchConfig.load(tmp_path / "linked" / "linked.yaml")
    assert Path(str(linked.tasks[0].train)).resolve() == tmp_path / "alice" / "a.csv"
    assert Path(str(linked.tasks[0].train)).is_file()
    absolute = SearchConfig.parse({**SEARCH, "tasks": [{"train": "/data/a.csv"}]}, where="test").from_folder(tmp_path)
    assert "/data/a.csv" in absolute.to_yaml(out)


def test_where_a_configuration_was_read_makes_no_difference_to_what_it_says(tmp_path: Path) -> None:
    search = written(tmp_path / "alice").search
    same = SearchConfig.parse(search.model_dump(), where="test")
    assert same == search
    assert hash(same) == hash(search)
    assert same != search.model_copy(update={"model": "another"})
