"""Damage to saved artefacts is noticed, values that are not numbers are refused, and old artefacts still load."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import gatedadapters as ga
from gatedadapters.artefact_files import (
    check_inside,
    is_finite,
    read_record_file,
    read_tensors,
    tensors_digest,
    with_digests,
    write_tensors,
)
from gatedadapters.errors import ArtifactError, AttachError, BudgetError
from gatedadapters.testing import tiny

SPACE = ga.SearchSpace.parse({"name": "small", "paths": [{"kind": "lora", "rank": 2}]}, where="test")
WEIGHTS = "adapters.safetensors"


def searched(model: Any, scale: float = 1.0) -> ga.Adapters:
    adapters = ga.attach(model, SPACE)
    with torch.no_grad():
        for parameter in adapters.weight_parameters():
            parameter.fill_(scale)
    return adapters


def compact(model: Any) -> ga.Adapters:
    adapters = searched(model)
    adapters.compact(adapters.discretize(scores=torch.ones_like(adapters.bank.kept)))
    return adapters


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Saved adapters of `tiny("bert")`."""
    compact(tiny("bert")[0]).save(tmp_path / "saved")
    return tmp_path / "saved"


def flip(file: Path, bit: int = 3, at: int = -1) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1 << bit
    file.write_bytes(raw)


def without_digests(file: Path) -> None:
    data = json.loads(file.read_text())
    del data["digests"]
    file.write_text(json.dumps(data))


def test_every_flipped_bit_of_a_tensor_is_noticed(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(131), "b": torch.zeros(2, 2, dtype=torch.bfloat16), "c": torch.empty(0)}
    digest = write_tensors(tmp_path / "t.safetensors", tensors, metadata={})
    raw = (tmp_path / "t.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for bit in range(8 * (len(raw) - start)):
        changed = bytearray(raw)
        changed[start + bit // 8] ^= 1 << bit % 8
        (tmp_path / "t.safetensors").write_bytes(changed)
        found = load_file(tmp_path / "t.safetensors")
        assert tensors_digest(found) != digest
    assert tensors_digest(dict(reversed(tensors.items()))) == digest
    for other in (
        {**tensors, "a": tensors["a"].view(1, 131)},
        {**tensors, "a": tensors["a"].view(torch.int32)},
        {"A": tensors["a"], "b": tensors["b"], "c": tensors["c"]},
    ):
        assert tensors_digest(other) != digest


def test_blocks_that_are_moved_or_lost_are_noticed() -> None:
    values = torch.randn(1000)
    digest = tensors_digest({"a": values})
    moved, lost, shifted = values.clone(), values.clone(), values.roll(1)
    moved[:128], moved[256:384] = values[256:384], values[:128]
    lost[300:400] = 0
    for other in (moved, lost, shifted, values[:-1], -values):
        assert tensors_digest({"a": other}) != digest
    assert tensors_digest({"a": torch.cat([values[:1], values])[1:]}) == digest  # wherever it lies in memory
    assert tensors_digest({"a": values.view(10, 100).t().contiguous().t().reshape(1000)}) == digest


def test_a_tensor_of_one_element_has_a_digest_whatever_its_stride() -> None:
    assert tensors_digest({"a": torch.ones(1).expand(1)}) == tensors_digest({"a": torch.ones(1)})
    assert tensors_digest({"a": torch.ones(()).expand(1)}) == tensors_digest({"a": torch.ones(1)})
    assert tensors_digest({"a": torch.ones(2)[:0]}) == tensors_digest({"a": torch.empty(0)})


def test_a_record_is_checked_whatever_its_layout(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(with_digests('{"version": 1, "x": [1.5, "é"]}', {"t": "crc32:0"}))
    found = read_record_file(file)
    assert (found.data, found.digest("t")) == ({"version": 1, "x": [1.5, "é"]}, "crc32:0")
    data = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(data.items())), indent=3))  # the same record, written by another program
    assert read_record_file(file).data == found.data
    for change in ({"x": [1.5000001, "é"]}, {"digests": {**data["digests"], "t": "crc32:1"}}, {"y": None}):
        file.write_text(json.dumps({**data, **change}))
        with pytest.raises(ArtifactError, match=r"changed since it was saved[\s\S]*verify=False"):
            read_record_file(file)
        assert read_record_file(file, verify=False).digests is None
    with pytest.raises(ArtifactError, match="does not belong to the record"):
        found.digest("another")


def test_a_damaged_tensor_is_refused_unless_nobody_wants_it_checked(saved: Path) -> None:
    before = ga.load_adapters(model := tiny("bert")[0], saved)
    before.detach()
    flip(saved / WEIGHTS)
    with pytest.raises(
        ArtifactError, match=r"changed since it was saved[\s\S]*adapters\.safetensors[\s\S]*verify=False"
    ):
        ga.load_adapters(model, saved)
    assert not hasattr(model, "gated_adapters")
    ga.load_adapters(model, saved, verify=False)
    with pytest.raises(ArtifactError, match="changed since"):
        ga.Shelf.load(tiny("bert")[0], {"a": saved})


def test_a_changed_digit_of_a_structure_is_refused(saved: Path) -> None:
    file = saved / "structure.json"
    structure = ga.Structure.load(saved)
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    for read in (ga.Structure.load, lambda folder: ga.load_adapters(tiny("bert")[0], folder)):
        with pytest.raises(ArtifactError, match='remove its entry "digests"'):
            read(saved)
    assert ga.Structure.load(saved, verify=False) == structure.model_copy(update={"seed": 1})
    without_digests(file)  # the remedy of the message
    ga.load_adapters(tiny("bert")[0], saved)


def test_files_of_two_artefacts_do_not_mix(saved: Path, tmp_path: Path) -> None:
    model = tiny("bert")[0]
    adapters = compact(model)
    with torch.no_grad():
        adapters.weight_parameters()[0].add_(1)
    adapters.save(tmp_path / "other")
    (tmp_path / "other" / WEIGHTS).replace(saved / WEIGHTS)
    with pytest.raises(ArtifactError, match="changed since"):
        ga.load_adapters(tiny("bert")[0], saved)


def test_artefacts_without_digests_load_with_a_note(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    ga.load_adapters(tiny("bert")[0], saved)
    assert not caplog.records
    without_digests(saved / "structure.json")
    with caplog.at_level(logging.WARNING):
        ga.load_adapters(tiny("bert")[0], saved)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no digests" in caplog.text
    assert "Save it again" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path: Path, value: float) -> None:
    model = tiny("bert")[0]
    adapters = compact(model)
    adapters.weight_parameters()[0].data.view(-1)[0] = value
    with pytest.raises(ArtifactError, match=r"not finite[\s\S]*inf or nan in paths[\s\S]*allow_nonfinite=True"):
        adapters.save(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    adapters.save(tmp_path / "out", allow_nonfinite=True)
    with pytest.raises(ArtifactError, match=r"not finite[\s\S]*allow_nonfinite=True"):
        ga.load_adapters(tiny("bert")[0], tmp_path / "out")
    again = ga.load_adapters(tiny("bert")[0], tmp_path / "out", allow_nonfinite=True)
    assert not is_finite(again.weight_parameters()[0].detach())


def test_a_delta_with_nan_is_neither_saved_nor_loaded(tmp_path: Path) -> None:
    model = tiny("bert")[0]
    name = "encoder.layer.0.output.dense.weight"
    delta = ga.apply_mask(model, ga.Mask.build(model, {name: torch.arange(5)}))
    delta.save(tmp_path / "whole")
    next(delta.parts()).values.data[2] = float("nan")
    delta.write()
    with pytest.raises(ArtifactError, match=f"values.{name}"):
        delta.save(tmp_path / "out")
    delta.save(tmp_path / "out", allow_nonfinite=True)
    fresh = tiny("bert")[0]
    with pytest.raises(ArtifactError, match="not finite"):
        ga.load_delta(fresh, tmp_path / "out")
    ga.load_delta(fresh, tmp_path / "out", allow_nonfinite=True).remove()
    flip(tmp_path / "whole" / "values.safetensors", bit=0)
    with pytest.raises(ArtifactError, match="changed since"):
        ga.load_delta(fresh, tmp_path / "whole")
    ga.load_delta(fresh, tmp_path / "whole", verify=False)


def test_large_finite_values_are_finite() -> None:
    """Their sum is not, by which most tensors are judged."""
    assert is_finite(torch.full((4,), 3e38))
    assert not is_finite(torch.tensor([1.0, float("inf"), float("-inf")]))


def test_nan_gates_and_scores_are_not_discretized() -> None:
    adapters = searched(tiny("bert")[0])
    scores = torch.ones_like(adapters.bank.kept)
    scores[0, 2] = float("nan")
    with pytest.raises(BudgetError, match="nan for 1 of"):
        adapters.discretize(scores=scores)
    with torch.no_grad():
        adapters.bank.log_alpha[0, 0] = float("nan")
    for budget in (None, ga.Budget(fraction=0.5)):
        with pytest.raises(AttachError, match=r"gates are not numbers[\s\S]*lora[\s\S]*lower rate"):
            adapters.discretize(budget)


def test_compaction_of_nan_adapters_says_so_and_changes_nothing() -> None:
    adapters = searched(tiny("bert")[0])
    structure = adapters.discretize(ga.Budget(fraction=0.5))
    parameter = adapters.weight_parameters()[0]
    parameter.data.view(-1)[0] = float("nan")
    before = [value.detach().clone() for value in adapters.weight_parameters()]
    with pytest.raises(AttachError, match=r"neither pruned nor compacted[\s\S]*inf or nan in 1 tensors"):
        adapters.compact(structure)
    assert adapters.bank is not None
    for old, new in zip(before, adapters.weight_parameters(), strict=True):
        assert torch.equal(old.nan_to_num(), new.detach().nan_to_num())


# -- folders from others -----------------------------------------------------------------------------------------------


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def link_out(file: Path) -> None:
    elsewhere = file.parents[1] / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


def link_to_a_device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("damage", [pipe, link_out, link_to_a_device])
@pytest.mark.parametrize("name", ["structure.json", WEIGHTS])
def test_links_out_of_the_folder_and_devices_are_not_opened(
    saved: Path, damage: Callable[[Path], None], name: str
) -> None:
    damage(saved / name)
    with pytest.raises(ArtifactError, match=r"link out of its folder|no regular file|not a saved adapter"):
        ga.load_adapters(tiny("bert")[0], saved)


def test_links_of_the_hub_cache_and_within_a_folder_are_followed(saved: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0a1b" / "adapter", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(saved.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../../blobs") / str(number))
    ga.load_adapters(tiny("bert")[0], snapshot)
    (tmp_path / "linked").symlink_to(snapshot, target_is_directory=True)
    ga.load_adapters(tiny("bert")[0], tmp_path / "linked")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "real").write_text("x")
    (inside / "name").symlink_to("real")
    check_inside(inside / "name")


def test_a_path_that_reads_what_was_not_computed_is_refused_in_the_call(saved: Path) -> None:
    file = saved / "structure.json"
    data = json.loads(file.read_text())
    del data["digests"]
    data["paths"][0]["site"]["write"]["module"] = ""
    file.write_text(json.dumps(data))
    model, batch = tiny("bert")
    ga.load_adapters(model, saved)
    with pytest.raises(AttachError, match="not computed"):
        model(**batch)


@pytest.mark.parametrize("module", ["gated_adapters.paths", "sparse_delta"])
def test_names_that_leave_the_backbone_are_refused(saved: Path, module: str) -> None:
    file = saved / "structure.json"
    data = json.loads(file.read_text())
    del data["digests"]
    data["paths"][0]["site"]["tap"]["module"] = module
    file.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"a part of the library"):
        ga.load_adapters(tiny("bert")[0], saved)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data["paths"][0].update(of=str(data["paths"][0]["of"])), "should be a valid integer"),
        (lambda data: data.update(tasks="task"), "should be a valid array"),
        (lambda data: data.update(dense_params=True), "should be a valid integer"),
        (lambda data: data["paths"][0]["site"].update(width_in=-48), "should be greater than 0"),
    ],
)
def test_values_of_another_type_are_refused_not_converted(
    saved: Path, change: Callable[[dict[str, Any]], None], says: str
) -> None:
    file = saved / "structure.json"
    data = json.loads(file.read_text())
    del data["digests"]
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=says):
        ga.load_adapters(tiny("bert")[0], saved)


def test_a_key_that_stands_twice_is_refused(saved: Path) -> None:
    file = saved / "structure.json"
    file.write_text('{"seed": 3, ' + file.read_text().lstrip().removeprefix("{"))
    with pytest.raises(ArtifactError, match="stands twice"):
        ga.load_adapters(tiny("bert")[0], saved)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules_to_save", 5),
        ("rank_pattern", [4]),
        ("use_rslora", "no"),
        ("alpha_pattern", ""),
        ("lora_alpha", "16"),
        ("lora_alpha", 0),
        ("r", 8.5),
        ("target_modules", {"q": 1}),
        ("layers_to_transform", "all"),
        ("rank_pattern", {"q": -1}),
    ],
)
def test_fields_of_a_peft_folder_have_one_type(tmp_path: Path, field: str, value: object) -> None:
    model = tiny("llama", head="lm")[0]
    ga.export_peft(compact(model), tmp_path / "peft")
    ga.detach(model)
    file = tmp_path / "peft" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(ArtifactError, match=rf"not as peft writes it[\s\S]*{field}"):
        ga.import_peft(model, tmp_path / "peft", verify=False)


def test_damage_to_an_export_to_peft_is_noticed_where_we_read_it(tmp_path: Path) -> None:
    model = tiny("llama", head="lm")[0]
    ga.export_peft(compact(model), tmp_path / "peft")
    ga.detach(model)
    config, weights = tmp_path / "peft" / "adapter_config.json", tmp_path / "peft" / "adapter_model.safetensors"
    text = config.read_text()
    config.write_text(json.dumps({**json.loads(text), "base_model_name_or_path": "mine", "task_type": "CAUSAL_LM"}))
    ga.import_peft(model, tmp_path / "peft").detach()  # what users fill in changes no result
    config.write_text(json.dumps({**json.loads(text), "lora_alpha": 4}))
    with pytest.raises(ArtifactError, match=r"changed since it was exported[\s\S]*verify=False"):
        ga.import_peft(model, tmp_path / "peft")
    ga.import_peft(model, tmp_path / "peft", verify=False).detach()
    config.write_text(text)
    flip(weights, bit=0)
    with pytest.raises(ArtifactError, match="changed since it was saved"):
        ga.import_peft(model, tmp_path / "peft")
    save_file(load_file(weights), weights)  # as peft writes it: without a digest
    ga.import_peft(model, tmp_path / "peft").detach()


def test_a_shelf_that_cannot_add_is_as_before(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gatedadapters.artifacts import shelf as module

    model = tiny("bert")[0]
    shelf = ga.Shelf.load(model, {"a": saved})
    hooks = {key: dict(shared.hooks) for key, (shared, _) in shelf._hooks.items()}
    original = module.point_hooks

    def interrupted(member: Any) -> Any:
        yield next(iter(original(member)))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "point_hooks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shelf.add("b", saved)
    assert list(shelf.members) == ["a"]
    assert {key: dict(shared.hooks) for key, (shared, _) in shelf._hooks.items()} == hooks


def test_an_unknown_kind_of_digest_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(2)}, metadata={})
    with pytest.raises(ArtifactError, match="unknown kind"):
        read_tensors(tmp_path / "t.safetensors", {"a": (2,)}, digest="sha256:00")
