"""The discrete result: plain data that survives JSON, compares, prints and says what tasks share."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import gatedadapters as ga
from gatedadapters.errors import ArtifactError, AttachError, TaskError
from gatedadapters.testing import tiny

Kept = dict[str, list[int]]  # task -> units kept, of the query map of block 0


def attached(tasks: tuple[str, ...] = ("default",), family: str = "llama") -> ga.Adapters:
    model, batch = tiny(family)
    return ga.attach(model, "lora-all-linear", batch, tasks=tasks)


def with_open(adapters: ga.Adapters, kept: dict[str, Kept]) -> ga.Structure:
    """The structure that keeps exactly these units of these paths, by task."""
    bank = adapters.bank
    assert bank is not None
    with torch.no_grad():
        bank.log_alpha.fill_(-4.0)
        for key, by_task in kept.items():
            for task, units in by_task.items():
                for unit in units:
                    bank.log_alpha[adapters.tasks.index(task), bank.slices[key].start + unit] = 4.0
    return adapters.discretize()


Q, K, DOWN = "layers/0/self_attn/q_proj:lora", "layers/0/self_attn/k_proj:lora", "layers/2/mlp/down_proj:lora"


@pytest.fixture
def shared() -> ga.Structure:
    """Tasks a and b: q keeps 0, 1 for a and 1, 2 for b; k keeps 5 for a; down keeps 7 for both."""
    kept = {Q: {"a": [0, 1], "b": [1, 2]}, K: {"a": [5]}, DOWN: {"a": [7], "b": [7]}}
    return with_open(attached(("a", "b")), kept)


def test_a_structure_lists_what_each_task_keeps(shared: ga.Structure) -> None:
    found = {path.key: (path.kept, dict(path.units), path.of) for path in shared.paths}
    assert found == {
        Q: ((0, 1, 2), {"a": (0, 1), "b": (1, 2)}, 8),
        K: ((5,), {"a": (5,)}, 8),
        DOWN: ((7,), {"a": (7,), "b": (7,)}, 8),
    }
    assert [path.options.size for path in shared.paths] == [len(path.kept) for path in shared.paths]
    # a rank of q (32 -> 32) is 64 parameters, of k (32 -> 16) 48, of down (48 -> 32) 80; each stores 2 routing values
    assert shared.params == 3 * 66 + 50 + 82
    assert shared.flops == 2 * (3 * 64 + 48 + 80)
    assert (shared.task_params("a"), shared.task_params("b")) == (2 * 66 + 50 + 82, 2 * 66 + 82)


def test_what_tasks_share_is_reported(shared: ga.Structure) -> None:
    assert shared.sharing() == {
        "params_per_task": {"a": 264, "b": 214},
        "params_used_by_n_tasks": {1: 66 + 66 + 50, 2: 66 + 82},
        "overlap": {"a / b": 2 / 5},
    }


def test_one_tasks_part_stores_no_routing(shared: ga.Structure) -> None:
    part = shared.for_task("b")
    assert part.tasks == ("b",)
    assert {path.key: path.kept for path in part.paths} == {Q: (1, 2), DOWN: (7,)}
    assert part.params == 2 * 64 + 80
    with pytest.raises(TaskError, match=r"(?s)one of a, b.*'c'"):
        shared.for_task("c")


def test_json_gives_back_an_equal_structure(shared: ga.Structure) -> None:
    again = ga.Structure.from_json(shared.to_json())
    assert again == shared
    assert again.to_json() == shared.to_json()
    data = json.loads(shared.to_json())
    assert data["version"] == 1
    assert data["seed"] == 0
    assert data["created_with"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert data["fingerprint"]["model_class"] == "LlamaModel"
    assert data["space"]["name"] == "lora-all-linear"
    assert set(data["paths"][0]["open_probability"]) == {"a", "b"}


def test_equal_searches_give_equal_structures_and_other_backbones_do_not(shared: ga.Structure) -> None:
    kept = {Q: {"a": [0, 1], "b": [1, 2]}, K: {"a": [5]}, DOWN: {"a": [7], "b": [7]}}
    assert with_open(attached(("a", "b")), kept) == shared
    other = with_open(attached(("a", "b"), family="mistral"), kept)
    assert other.fingerprint != shared.fingerprint


def test_diff_names_what_came_went_and_changed() -> None:
    adapters = attached()
    before = with_open(adapters, {Q: {"default": [0, 1]}, K: {"default": [0]}})
    after = with_open(adapters, {Q: {"default": [0, 1, 2]}, DOWN: {"default": [3]}})
    assert before.diff(after) == [f"- {K} (1 of 8)", f"~ {Q} (2 -> 3 of 8)", f"+ {DOWN} (1 of 8)"]
    assert before.diff(before) == []
    moved = with_open(adapters, {Q: {"default": [6, 7]}, K: {"default": [0]}})
    assert before.diff(moved) == [f"~ {Q} (2 -> 2 of 8)"]


def test_the_table_has_a_row_a_block_and_a_column_a_place(shared: ga.Structure) -> None:
    title, header, _, *rows = shared.table().splitlines()
    assert title.startswith("330 parameters in 3 paths (")
    assert "attn.q lora" in header
    assert [row.split()[0] for row in rows] == ["0", "1", "2"]
    assert "3/8" in rows[0]
    assert "1/8" in rows[0]
    assert rows[1].split()[1:] == ["-"] * 7
    assert str(shared) == shared.table()


def test_a_structure_is_frozen(shared: ga.Structure) -> None:
    with pytest.raises(ValueError, match="frozen"):
        shared.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Structure as JSON"),
        ('{"version": 1, "paths"', "Structure as JSON"),
        ("[1, 2]", "a JSON list"),
        ('{"version": 7}', "version 7"),
        ('{"version": 1}', "fingerprint"),
        (b"\xff\xfe\x00", "Structure as JSON"),
    ],
)
def test_what_is_no_structure_is_refused(text: str | bytes, said: str) -> None:
    with pytest.raises(ArtifactError, match=rf"(?s){said}.*where:?\s.*there"):
        ga.Structure.from_json(text, where="there")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["paths"][0].update(units={"a": [99]}), "do not make"),
        (lambda d: d["paths"][0]["options"].update(kind="nonesuch"), "known kinds"),
        (lambda d: d["paths"][0].pop("of"), "of"),
        (lambda d: d.update(colour="blue"), "colour"),
    ],
)
def test_a_structure_that_contradicts_itself_names_the_field(change: object, said: str, shared: ga.Structure) -> None:
    data = copy.deepcopy(json.loads(shared.to_json()))
    change(data)  # type: ignore[operator]
    with pytest.raises(ArtifactError, match=said):
        ga.Structure.from_json(json.dumps(data))


def test_half_of_a_surrogate_pair_is_no_text(shared: ga.Structure) -> None:
    data = json.loads(shared.to_json()) | {"tasks": ["\ud800"]}
    with pytest.raises(ArtifactError, match=r"(?s)not a Structure as it was saved.*text.*there"):
        ga.Structure.from_json(json.dumps(data), where="there")


def test_loading_reads_a_file_or_a_folder_and_names_what_is_missing(shared: ga.Structure, tmp_path: Path) -> None:
    (tmp_path / "structure.json").write_text(shared.to_json(), encoding="utf-8")
    assert ga.Structure.load(tmp_path) == ga.Structure.load(tmp_path / "structure.json") == shared
    with pytest.raises(ArtifactError, match=r"(?s)where:.*nowhere.*fix:.*structure\.json"):
        ga.Structure.load(tmp_path / "nowhere")


def test_pruning_to_a_structure_of_other_candidates_is_refused_and_changes_nothing(shared: ga.Structure) -> None:
    model, batch = tiny("llama")
    other = ga.attach(model, "attention-only", batch, tasks=("a", "b"))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for act in (other.prune, other.compact):
        with pytest.raises(AttachError, match=rf"(?s)other candidates.*{DOWN}.*fix:"):
            act(shared)
    assert other.bank is not None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
