"""What others wrote becomes plain data of a moderate size, or is refused with the place."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from gatedadapters import untrusted
from gatedadapters.config import SearchConfig, SearchSpace, StudyConfig
from gatedadapters.errors import ArtifactError, ConfigError, DataError
from gatedadapters.untrusted import load_json, load_yaml

ROOT = Path(__file__).parents[1]
NINE_LEVELS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)
)
MERGES = "m0: &m0 {k: v}\n" + "\n".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, 25))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2024-13-45", "a timestamp.*line 2"),
        ("a: !!int 'x'", "this is no int: x.*line 1"),
        ("a: !!timestamp 'x'", "a timestamp.*line 1"),
        ("a: " + "9" * 5000, "this is no int"),
        ("a: 0x" + "f" * 5000, "beyond 64 bits"),
        ("a: 1:" + "59:" * 2000 + "1", "beyond 64 bits"),
        ("a: 1000000000000000000000000000000", "beyond 64 bits"),
        ('a: "\\U00110000"', "invalid Unicode"),
        ("[" * 3000, "deeper than 64 levels"),
        ("{a: " * 3000, "deeper than 64 levels"),
        ("- " * 3000 + "x", "deeper than 64 levels"),
        (NINE_LEVELS, "20,000 values, with all aliases replaced"),
        (MERGES, "20,000 values, with all aliases replaced"),
        ("- x\n" * 60_000, "20,000 values"),
        ("# " + "x" * 300_000, "characters; at most"),
        ("a: &a [*a]", "'a' stands for itself"),
        ("a: *b", "'b' stands for nothing"),
        ("a: 1\nb: 2\na: 3", "'a' stands twice"),
        ("a: !!set {x, y}", "a set"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: 1\n---\na: 2", "single document"),
    ],
)
def test_hostile_yaml_is_refused_with_its_place(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s){says}") as caught:
        load_yaml(text)
    assert len(str(caught.value)) < 1000


def test_an_alias_is_what_it_stands_for() -> None:
    assert load_yaml("a: &x {k: [1]}\nb: *x\nc: {<<: *x, d: 2}") == {
        "a": {"k": [1]},
        "b": {"k": [1]},
        "c": {"k": [1], "d": 2},
    }


OWN = [path for path in sorted(ROOT.glob("**/*.y*ml")) if "site-packages" not in path.parts]  # not an environment's


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_ordinary_yaml_is_read_as_pyyaml_reads_it(path: Path) -> None:
    if path.name != "mkdocs.yml":
        assert load_yaml(path.read_text()) == yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 5000, "deeper than 64 levels, at character 64"),
        ('{"a": ' * 5000, "deeper than 64 levels"),
        ('{"a": 1, "b": {"x": 1, "x": 2}}', "'x' stands twice"),
        ('{"a": ' + "9" * 5000 + "}", "beyond 64 bits"),
        (b'{"a": "\xff"}', "utf-8"),
        ("{", "Expecting"),
    ],
)
def test_hostile_json_is_refused(text: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        load_json(text)
    assert len(str(caught.value)) < 1000


def test_brackets_in_strings_do_not_nest() -> None:
    data = {"a": "[" * 5000 + '"' + "{\\" * 5000, "b": [[]] * 200}
    assert load_json(json.dumps(data)) == data


def test_every_file_of_configurations_is_answered_at_once(tmp_path: Path) -> None:
    for name, text in {"bomb": NINE_LEVELS, "deep": "[" * 3000, "seeds": NINE_LEVELS + "\nseeds: *a8"}.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(text)
        for read in (SearchConfig.load, StudyConfig.load, SearchSpace.load):
            start = time.process_time()
            with pytest.raises(ConfigError) as caught:
                read(file)
            assert time.process_time() - start < 2
            assert str(file) in str(caught.value)
            assert len(str(caught.value)) < 1000


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    for path in (tmp_path / "folder.yaml", tmp_path / "endless.yaml"):
        path.mkdir() if path.stem == "folder" else path.symlink_to("/dev/zero")
        with pytest.raises(ConfigError, match=r"a folder|no regular file"):
            SearchConfig.load(path)


def test_deep_lines_of_a_table_are_refused(tmp_path: Path) -> None:
    from gatedadapters.data import read_task

    for cell in ("[" * 5000 + "]" * 5000, "9" * 5000):
        (tmp_path / "t.jsonl").write_text(f'{{"text": "a", "label": 1}}\n{{"text": "b", "label": {cell}}}\n')
        with pytest.raises(DataError, match=r"malformed line") as caught:
            read_task(tmp_path / "t.jsonl")
        assert "t.jsonl, line 2" in str(caught.value)


def test_a_deep_structure_is_refused(tmp_path: Path) -> None:
    from gatedadapters import Structure

    (tmp_path / "structure.json").write_text('{"version": ' + "[" * 5000)
    with pytest.raises(ArtifactError, match="deeper than 64 levels"):
        Structure.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 10**30),
        ("steps", 1e30),
        ("batch_size", 10**30),
        pytest.param("batch_size", int("f" * 5000, 16), id="more digits than Python prints"),
        ("seed", 10**30),
        ("seed", -1),
        ("seed", 2**32),
        ("learning_rate", math.inf),
        ("weight_decay", math.inf),
        ("warmup", math.nan),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        SearchConfig.parse({"model": "m", "tasks": [{"train": "a.csv"}], "training": {field: value}}, where="test")
    assert f"training.{field}" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_name_longer_than_any_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="model: String should have at most 4096 characters"):
        SearchConfig.parse({"model": "x" * 100_000, "tasks": [{"train": "a.csv"}]}, where="test")


@pytest.mark.parametrize("rank", [10**30, 2**16 + 1])
def test_a_rank_wider_than_any_layer_is_refused(rank: int) -> None:
    with pytest.raises(ConfigError, match=r"paths\.0\.rank"):
        SearchSpace.parse({"paths": [{"kind": "lora", "rank": rank}]}, where="test")


def test_a_study_that_would_never_end_is_refused() -> None:
    search = {"model": "m", "tasks": [{"train": "a.csv"}]}
    names = ("training.learning_rate", "training.weight_decay", "training.warmup", "budget.fraction")
    factors: dict[str, Any] = {name: {"low": 0.1, "high": 0.9, "points": 20} for name in names}
    data = {"name": "n", "search": search, "factors": factors, "design": "grid"}
    with pytest.raises(ConfigError, match=r"480,000 trials; a study has at most 10,000"):
        StudyConfig.parse(data, where="test")
    factors["budget.fraction"]["points"] = 190
    with pytest.raises(ConfigError, match=r"250 values; at most 200"):
        StudyConfig.parse({**data, "design": "one_factor"}, where="test")


def test_the_limits_leave_room() -> None:
    assert load_yaml("[" * (untrusted.MOST_DEPTH - 1) + "]" * (untrusted.MOST_DEPTH - 1)) is not None
    assert len(load_yaml("- x\n" * 19_000)) == 19_000
