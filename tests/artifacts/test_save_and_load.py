"""Saved adapters come back bit for bit, or not at all."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import gatedadapters as ga
from gatedadapters.errors import ArtifactError, AttachError
from gatedadapters.testing.backbones import tiny

WEIGHTS = "adapters.safetensors"
TASKS = {"mood": 2, "topic": 4}


def classifier(seed: int = 0) -> tuple[ga.MultiTaskClassifier, dict[str, Tensor]]:
    """A tiny encoder with two heads, and a batch that mixes both tasks."""
    backbone, batch = tiny("bert")
    torch.manual_seed(seed)
    model = ga.MultiTaskClassifier(backbone, TASKS, dropout=0.0).eval()
    return model, {**batch, "task_ids": torch.tensor([0, 1])}


def compacted(model: nn.Module, space: str = "encoder-mixed", share: float = 0.3, seed: int = 0) -> ga.Adapters:
    """Adapters that do something, pruned by chance to `share` of the candidates, compact."""
    tasks = tuple(TASKS) if isinstance(model, ga.MultiTaskClassifier) else ("default",)
    adapters = ga.attach(model, space, tasks=tasks)
    bank = adapters.bank
    assert bank is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.weight_parameters():
            parameter.normal_(0, 0.1, generator=generator)
        bank.log_alpha.normal_(1.0, 2.0, generator=generator)
    scores = torch.rand(bank.tasks, bank.n_units, generator=generator)
    adapters.compact(adapters.discretize(ga.Budget(fraction=share), scores=scores))
    return adapters


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ga.Adapters, Tensor]:
    """A saved two-task classifier: its folder, its adapters and what it computes."""
    model, batch = classifier()
    adapters = compacted(model)
    with torch.no_grad():
        for head in adapters.head_parameters():
            head.normal_()
        logits = model(**batch).logits
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    adapters.save(folder)
    return folder, adapters, logits


def test_whoever_can_read_the_structure_can_read_the_weights(artefact: tuple[Path, ga.Adapters, Tensor]) -> None:
    modes = {file.name: file.stat().st_mode for file in artefact[0].iterdir()}
    assert WEIGHTS in modes
    assert len(set(modes.values())) == 1, modes


def loaded_file(folder: Path) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}


def copied(artefact: tuple[Path, ga.Adapters, Tensor], to: Path) -> Path:
    to.mkdir()
    for file in artefact[0].iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- round trip --------------------------------------------------------------------------------------------


def test_loaded_output_equals_saved_output_bit_for_bit_heads_included(
    artefact: tuple[Path, ga.Adapters, Tensor],
) -> None:
    folder, adapters, logits = artefact
    model, batch = classifier(seed=5)
    loaded = ga.load_adapters(model, folder)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)
    assert loaded.structure == adapters.structure
    assert loaded.tasks == adapters.tasks
    assert loaded.head_names == adapters.head_names != ()


@pytest.mark.parametrize(("family", "space"), [("llama", "decoder-mixed"), ("gpt2", "lora-all-linear")])
def test_a_decoder_comes_back_bit_for_bit(tmp_path: Path, family: str, space: str) -> None:
    model, batch = tiny(family, head="lm")
    adapters = compacted(model, space)
    assert adapters.head_names == ()
    with torch.no_grad():
        expected = model(**batch).logits
    adapters.save(tmp_path / "adapter")
    other, _ = tiny(family, head="lm")
    ga.load_adapters(other, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, expected)


def test_what_was_loaded_can_be_trained_and_saved_again(
    tmp_path: Path, artefact: tuple[Path, ga.Adapters, Tensor]
) -> None:
    model, batch = classifier()
    loaded = ga.load_adapters(model, artefact[0])
    model(**batch, labels=torch.tensor([1, 3])).loss.backward()
    assert all(p.grad is not None for p in [*loaded.weight_parameters(), *loaded.head_parameters()])
    loaded.save(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(artefact[0])


def test_an_empty_structure_comes_back_as_the_backbone_with_its_heads(tmp_path: Path) -> None:
    model, batch = classifier()
    adapters = ga.attach(model, "encoder-mixed", tasks=tuple(TASKS))
    assert adapters.bank is not None
    with torch.no_grad():
        adapters.bank.log_alpha.fill_(-4.0)
        expected = model(**batch).logits
    adapters.compact()
    adapters.save(tmp_path / "adapter")
    other, _ = classifier(seed=3)
    assert ga.load_adapters(other, tmp_path / "adapter").structure == adapters.structure
    with torch.no_grad():
        assert torch.equal(other(**batch).logits, expected)


def test_half_precision_halves_the_file_and_rounds_the_values_once(
    tmp_path: Path, artefact: tuple[Path, ga.Adapters, Tensor]
) -> None:
    model, _ = classifier()
    loaded = ga.load_adapters(model, artefact[0])
    loaded.save(tmp_path / "half", dtype=torch.bfloat16)
    full, half = load_file(artefact[0] / WEIGHTS), load_file(tmp_path / "half" / WEIGHTS)
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in full.items())
    ga.detach(model)
    again = ga.load_adapters(model, tmp_path / "half")
    assert {p.dtype for p in again.weight_parameters()} == {torch.float32}
    for name, value in again.paths.state_dict().items():
        if value.is_floating_point():  # positions of elements are in the structure
            assert torch.equal(value, half[f"paths.{name}"].float())


def test_one_task_of_several_is_saved_without_routing(tmp_path: Path) -> None:
    model, batch = classifier()
    del batch["task_ids"]
    adapters = ga.attach(model, "encoder-mixed", tasks=tuple(TASKS))
    assert adapters.bank is not None
    with torch.no_grad():
        for parameter in adapters.weight_parameters():
            parameter.normal_(0, 0.1)
        adapters.bank.log_alpha.normal_(0.5, 2.0)
        adapters.set_task("topic")
        expected = model.backbone(**batch).last_hidden_state
    adapters.compact(task="topic")
    adapters.save(tmp_path / "topic")
    assert not [name for name in loaded_file(tmp_path / "topic") if name.endswith("routing")]
    other, _ = classifier()
    assert ga.load_adapters(other, tmp_path / "topic").tasks == ("topic",)
    with torch.no_grad():
        found = other.backbone(**batch).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_the_file_holds_the_parameters_and_next_to_nothing_else(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    config.vocab_size = 100
    adapters = ga.attach(BertModel(config), "lora-all-linear")
    structure = adapters.compact(adapters.discretize(ga.Budget(fraction=0.5)))
    assert sum(p.numel() for p in adapters.weight_parameters()) == structure.params
    adapters.save(tmp_path / "adapter")
    assert 1 <= (tmp_path / "adapter" / WEIGHTS).stat().st_size / (4 * structure.params) <= 1.02


def test_counted_parameters_are_the_stored_ones_with_several_tasks(
    artefact: tuple[Path, ga.Adapters, Tensor],
) -> None:
    folder, adapters, _ = artefact
    assert adapters.structure is not None
    stored = loaded_file(folder)
    assert sum(v.numel() for n, v in stored.items() if n.startswith("paths.")) == adapters.structure.params
    assert {n for n in stored if n.startswith("heads.")} == {f"heads.{n}" for n in adapters.head_names}


def test_the_same_backbone_in_half_precision_is_recognised(artefact: tuple[Path, ga.Adapters, Tensor]) -> None:
    folder, _, logits = artefact
    model, batch = classifier()
    model.backbone.bfloat16()
    ga.load_adapters(model, folder)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(**batch).logits[1].float(), logits[1], atol=0.3, rtol=0.1)


# -- what is refused ---------------------------------------------------------------------------------------


def test_gated_adapters_are_not_saved(tmp_path: Path) -> None:
    adapters = ga.attach(tiny("bert")[0], "lora-all-linear")
    with pytest.raises(ArtifactError, match=r"only compact[\s\S]*gates over 18[\s\S]*compact\(\) first"):
        adapters.save(tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_another_type_of_numbers_is_refused(tmp_path: Path) -> None:
    adapters = compacted(tiny("bert")[0])
    with pytest.raises(ArtifactError, match=r"float32 or torch.bfloat16[\s\S]*float16[\s\S]*dtype="):
        adapters.save(tmp_path / "adapter", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


def snapshot(model: nn.Module) -> object:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return state, grads, hooks


def assert_untouched(model: nn.Module, before: object) -> None:
    (state, *rest), (state_now, *rest_now) = before, snapshot(model)  # type: ignore[misc]
    assert rest == rest_now
    assert state.keys() == state_now.keys()
    assert all(torch.equal(value, state_now[name]) for name, value in state.items())


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def cut_in_the_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:40])


def empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def pickled(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (Path.touch, (folder / "exploded",))  # type: ignore[return-value]

    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb()))


def torch_saved(folder: Path) -> None:
    torch.save(loaded_file(folder), folder / WEIGHTS)


def weights_absent(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def weights_of_others(folder: Path) -> None:
    save_file({"lora_A": torch.zeros(2, 2)}, folder / WEIGHTS)


def one_missing(folder: Path) -> None:
    tensors = loaded_file(folder)
    del tensors[next(iter(tensors))]
    save_file(tensors, folder / WEIGHTS)


def one_too_many(folder: Path) -> None:
    save_file({**loaded_file(folder), "paths.smuggled": torch.zeros(1)}, folder / WEIGHTS)


def one_of_another_shape(folder: Path) -> None:
    tensors = loaded_file(folder)
    name = next(name for name in tensors if name.endswith(".down"))
    save_file({**tensors, name: tensors[name][:, :-1].clone()}, folder / WEIGHTS)


def of_another_type(folder: Path) -> None:
    save_file({name: value.half() for name, value in loaded_file(folder).items()}, folder / WEIGHTS)


def of_two_types(folder: Path) -> None:
    tensors = loaded_file(folder)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name].bfloat16()}, folder / WEIGHTS)


def edit(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "structure.json"
    data = json.loads(path.read_text())
    del data["digests"]  # as if another program had written it
    change(data)
    path.write_text(json.dumps(data))


def structure_truncated(folder: Path) -> None:
    path = folder / "structure.json"
    path.write_text(path.read_text()[:500])


def structure_of_the_future(folder: Path) -> None:
    edit(folder, lambda data: data.update(version=3))


def structure_with_unknown_key(folder: Path) -> None:
    edit(folder, lambda data: data.update(colour="red"))


def structure_with_unknown_kind(folder: Path) -> None:
    edit(folder, lambda data: data["paths"][0]["options"].update(kind="prefix"))  # type: ignore[index]


def structure_with_wrong_units(folder: Path) -> None:
    edit(folder, lambda data: data["paths"][0].update(units={"mood": [0, 99]}))  # type: ignore[index]


def structure_absent(folder: Path) -> None:
    (folder / "structure.json").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncated, ["cannot be read", "a whole safetensors file", "truncated or foreign", WEIGHTS]),
        (cut_in_the_header, ["cannot be read", "40 bytes that are truncated or foreign", WEIGHTS]),
        (empty, ["0 bytes", WEIGHTS]),
        (pickled, ["a pickled file", "never opened"]),
        (torch_saved, ["a pickled file", "never opened"]),
        (weights_absent, ["no such file", WEIGHTS]),
        (weights_of_others, ["not the one that belongs to the record", "1 tensors, lora_A among them", "together"]),
        (one_missing, ["not the one that belongs to the record", "among them", "together"]),
        (one_too_many, ["not the one that belongs to the record", "paths.smuggled among them"]),
        (one_of_another_shape, ["another shape", ".down in", WEIGHTS]),
        (of_another_type, ["F32, BF16", "F16", "save the adapters again"]),
        (of_two_types, ["all of one type", "BF16, F32"]),
        (structure_truncated, ["a Structure as JSON", "structure.json", "truncated or foreign"]),
        (structure_of_the_future, ["version 1 or 2", "version 3", "the release that wrote it"]),
        (structure_with_unknown_key, ["colour", "structure.json"]),
        (structure_with_unknown_kind, ["unknown path kind 'prefix'", "lora", "structure.json"]),
        (structure_with_wrong_units, ["units", "99", "structure.json"]),
        (
            structure_absent,
            ["not a saved adapter", "structure.json and adapters.safetensors", "Adapters.save"],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_damaged_artefact_is_refused_and_the_model_left_alone(
    tmp_path: Path,
    artefact: tuple[Path, ga.Adapters, Tensor],
    damage: Callable[[Path], None],
    says: list[str],
) -> None:
    folder = copied(artefact, tmp_path / "adapter")
    damage(folder)
    model, _ = classifier()
    before = snapshot(model)
    with pytest.raises(ArtifactError) as caught:
        ga.load_adapters(model, folder)
    for part in says:
        assert part in str(caught.value)
    assert_untouched(model, before)
    assert not (folder / "exploded").exists()


def changed_value(model: ga.MultiTaskClassifier) -> nn.Module:
    with torch.no_grad():
        model.backbone.encoder.layer[1].output.dense.weight.mul_(1.01)
    return model


def other_shape(model: ga.MultiTaskClassifier) -> nn.Module:
    model.backbone.embeddings.word_embeddings = nn.Embedding(7, 32)
    return model


class Renamed(ga.MultiTaskClassifier):
    """The same parameters in another class."""


def other_class(model: ga.MultiTaskClassifier) -> nn.Module:
    model = copy.deepcopy(model)
    model.__class__ = Renamed
    return model


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed_value, ["another backbone (values of parameters differ)", 'base="updated"']),
        (lambda model: model.half(), ["(values of parameters differ)", "float16 rounds values", "then model.half()"]),
        (other_shape, ["names or shapes of parameters and values of parameters differ"]),
        (other_class, ["another backbone (class differ)", "MultiTaskClassifier (", "Renamed ("]),
        (lambda model: tiny("bert")[0], ["lacks task heads", "heads.mood.bias", "a BertModel without them"]),
    ],
)
def test_another_backbone_is_refused_and_the_difference_named(
    artefact: tuple[Path, ga.Adapters, Tensor],
    change: Callable[[ga.MultiTaskClassifier], nn.Module],
    says: list[str],
) -> None:
    model = change(classifier()[0])
    before = snapshot(model)
    with pytest.raises(ArtifactError) as caught:
        ga.load_adapters(model, artefact[0])
    for part in [*says, "expected:", "got:", "where:", "fix:", str(artefact[0])]:
        assert part in str(caught.value)
    assert_untouched(model, before)


def test_a_head_of_another_size_is_refused(artefact: tuple[Path, ga.Adapters, Tensor]) -> None:
    model = ga.MultiTaskClassifier(tiny("bert")[0], {"mood": 2, "topic": 9})
    with pytest.raises(ArtifactError, match=r"another shape[\s\S]*\(9,\)[\s\S]*\(4,\)[\s\S]*heads.topic.bias"):
        ga.load_adapters(model, artefact[0])


def test_an_updated_backbone_is_accepted_on_request_and_recorded(
    artefact: tuple[Path, ga.Adapters, Tensor],
) -> None:
    model = changed_value(classifier()[0])
    loaded = ga.load_adapters(model, artefact[0], base="updated")
    old = ga.Structure.load(artefact[0])
    assert loaded.structure is not None
    assert loaded.structure.lineage == (old.fingerprint,)
    assert loaded.structure.paths == old.paths
    assert loaded.structure.fingerprint.shapes == old.fingerprint.shapes
    assert loaded.structure.fingerprint.values != old.fingerprint.values


def test_lineage_is_saved_and_grows_with_each_update(
    artefact: tuple[Path, ga.Adapters, Tensor], tmp_path: Path
) -> None:
    second, third = changed_value(classifier()[0]), changed_value(classifier()[0])
    with torch.no_grad():
        next(third.parameters()).add_(1)
    loaded = ga.load_adapters(second, artefact[0], base="updated")
    loaded.save(tmp_path / "second")
    again = ga.load_adapters(changed_value(classifier()[0]), tmp_path / "second")  # the same base: nothing to add
    assert again.structure == loaded.structure
    last = ga.load_adapters(third, tmp_path / "second", base="updated").structure
    assert last is not None
    assert loaded.structure is not None
    assert last.lineage == (ga.Structure.load(artefact[0]).fingerprint, loaded.structure.fingerprint)
    assert ga.Structure.from_json(last.to_json()) == last
    assert "lineage" not in (artefact[0] / "structure.json").read_text()  # readable by earlier releases


def test_an_update_of_another_layout_is_refused_and_the_first_misplaced_path_named(
    artefact: tuple[Path, ga.Adapters, Tensor],
) -> None:
    model, _ = classifier()
    del model.backbone.encoder.layer[1:]
    with pytest.raises(ArtifactError, match=r"no module backbone\.encoder\.layer\.[12]"):
        ga.load_adapters(model, artefact[0], base="updated")


def test_loading_onto_adapters_is_refused(artefact: tuple[Path, ga.Adapters, Tensor]) -> None:
    model, _ = classifier()
    ga.load_adapters(model, artefact[0])
    with pytest.raises(AttachError, match="already has adapters"):
        ga.load_adapters(model, artefact[0])


def test_a_wrong_path_and_a_peft_adapter_are_named(tmp_path: Path) -> None:
    model = tiny("bert")[0]
    with pytest.raises(ArtifactError, match=r"no such folder[\s\S]*nowhere[\s\S]*check the path"):
        ga.load_adapters(model, tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"a peft adapter[\s\S]*import it"):
        ga.load_adapters(model, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"not a saved adapter[\s\S]*a file"):
        ga.load_adapters(model, tmp_path / "file")
