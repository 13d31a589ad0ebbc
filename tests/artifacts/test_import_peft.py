"""An existing LoRA becomes gated paths that compute what peft computes, or is refused and the model left alone."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from exchange import compacted, loaded_by_peft, output, peft, space
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gatedadapters as ga
from gatedadapters.artifacts import singular_values
from gatedadapters.errors import ArtifactError, AttachError
from gatedadapters.testing.backbones import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUERY = "layer.1.attention.self.query"
TARGETS = {
    "bert": (["query", "value", "output.dense"], "output.dense", "value"),
    "gpt2": (["c_attn", "c_fc", "mlp.c_proj"], "c_fc", "c_attn"),
    "llama": (["q_proj", "v_proj", "down_proj"], "down_proj", "v_proj"),
    "t5": (["q", "v", "wo"], "wo", "v"),
    "qwen2_moe": (["q_proj", "o_proj", "shared_expert.up_proj"], "o_proj", "shared_expert.up_proj"),
}


def saved_by_peft(folder: Path, family: str, head: str, **changes: object) -> tuple[Tensor, dict[str, Tensor]]:
    """A LoRA with ranks, alphas and random weights of its own; what peft computes with it, and the batch."""
    model, batch = tiny(family, head=head)
    targets, other_rank, other_alpha = TARGETS[family]
    settings: dict[str, object] = {
        "r": 3,
        "lora_alpha": 12,
        "target_modules": targets,
        "rank_pattern": {other_rank: 5},
        "alpha_pattern": {other_alpha: 2},
        "lora_dropout": 0.1,
        "fan_in_fan_out": family == "gpt2",
    }
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**settings, **changes})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.15, generator=generator)
    wrapped.save_pretrained(folder)
    return output(wrapped, batch), batch


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("lora") / "bert"
    expected, batch = saved_by_peft(folder, "bert", "classification", task_type="SEQ_CLS")
    return folder, expected, batch


# -- what comes in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_stabilised", [False, True])
@pytest.mark.parametrize("family", TARGETS)
def test_an_imported_lora_computes_what_peft_does(tmp_path: Path, family: str, rank_stabilised: bool) -> None:
    expected, batch = saved_by_peft(tmp_path, family, "lm", use_rslora=rank_stabilised)
    model, _ = tiny(family, head="lm")
    plain = output(model, batch)
    adapters = ga.import_peft(model, tmp_path, batch)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(output(model, batch), expected, atol=1e-5, rtol=0)
    with adapters.disabled():
        assert torch.equal(output(model, batch), plain)
    assert sorted({path.units for path in adapters.paths.values()}) == [3, 5]  # type: ignore[union-attr, type-var]
    ga.detach(model)
    assert torch.equal(output(model, batch), plain)


def test_modules_to_save_become_trained_heads(bert_folder: tuple[Path, Tensor, dict[str, Tensor]]) -> None:
    folder, expected, batch = bert_folder
    model, _ = tiny("bert", head="classification", seed=0)
    nn.init.zeros_(model.classifier.weight)
    adapters = ga.import_peft(model, folder)
    torch.testing.assert_close(output(model, batch), expected, atol=1e-5, rtol=0)
    assert adapters.head_names == ("classifier.weight", "classifier.bias")
    assert all(head.requires_grad for head in adapters.head_parameters())
    assert not any(p.requires_grad for n, p in model.bert.named_parameters())


def test_maps_outside_the_blocks_come_along(tmp_path: Path) -> None:
    changes = {"target_modules": ["pooler.dense", "key"], "rank_pattern": {}, "alpha_pattern": {}}
    expected, batch = saved_by_peft(tmp_path / "lora", "bert", "classification", **changes)
    model, _ = tiny("bert", head="classification")
    adapters = ga.import_peft(model, tmp_path / "lora")
    assert "bert/pooler/dense:lora" in adapters.paths
    torch.testing.assert_close(output(model, batch), expected, atol=1e-5, rtol=0)
    adapters.compact()
    assert "outside.other lora" in str(adapters.structure)
    adapters.save(tmp_path / "own")
    other, _ = tiny("bert", head="classification")
    ga.load_adapters(other, tmp_path / "own")
    assert torch.equal(output(other, batch), output(model, batch))


def test_a_lora_of_the_backbone_alone_finds_it_under_a_head(tmp_path: Path) -> None:
    expected, batch = saved_by_peft(tmp_path, "bert", "base")
    model = ga.MultiTaskClassifier(tiny("bert")[0], {"a": 2}).eval()
    adapters = ga.import_peft(model, tmp_path)
    assert all(key.startswith("backbone/") for key in adapters.paths)
    torch.testing.assert_close(output(model.backbone, batch), expected, atol=1e-5, rtol=0)


def test_half_precision_weights_are_read(tmp_path: Path) -> None:
    expected, batch = saved_by_peft(tmp_path, "llama", "lm")
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name: value.half() for name, value in tensors.items()}, tmp_path / WEIGHTS)
    model, _ = tiny("llama", head="lm")
    ga.import_peft(model, tmp_path)
    torch.testing.assert_close(output(model, batch), expected, atol=1e-3, rtol=0)


def test_a_module_that_was_never_trained_stays_a_zero_contribution(tmp_path: Path) -> None:
    _, batch = saved_by_peft(tmp_path, "bert", "base")
    save_file({name: torch.zeros_like(value) for name, value in tensors_of(tmp_path).items()}, tmp_path / WEIGHTS)
    model, _ = tiny("bert")
    plain = output(model, batch)
    adapters = ga.import_peft(model, tmp_path, gates=ga.GateConfig(levels=("path",)))
    assert torch.equal(singular_values(adapters), torch.zeros(1, len(adapters.paths)))
    adapters.compact()
    assert torch.equal(output(model, batch), plain)


# -- what can be done with it ------------------------------------------------------------------------------------------


def test_ranks_are_singular_directions_in_order(bert_folder: tuple[Path, Tensor, dict[str, Tensor]]) -> None:
    model, _ = tiny("bert", head="classification")
    adapters = ga.import_peft(model, bert_folder[0])
    assert adapters.bank is not None
    scores = singular_values(adapters)
    for key, path in adapters.paths.items():
        product = (path.up @ path.down).detach().double()  # type: ignore[union-attr, operator]
        oracle = torch.linalg.svdvals(product)[: path.units].float()  # type: ignore[union-attr]
        torch.testing.assert_close(scores[0, adapters.bank.slices[key]], oracle, atol=1e-5, rtol=1e-5)


def test_choosing_by_singular_values_is_truncation_across_modules(
    bert_folder: tuple[Path, Tensor, dict[str, Tensor]],
) -> None:
    folder, _, batch = bert_folder
    model, _ = tiny("bert", head="classification")
    adapters = ga.import_peft(model, folder)
    products = {key: (path.up @ path.down).detach().double() for key, path in adapters.paths.items()}  # type: ignore[union-attr, operator]
    structure = adapters.discretize(ga.Budget(fraction=0.5), scores=singular_values(adapters))
    adapters.compact(structure)

    plain, _ = tiny("bert", head="classification")
    plain.classifier.load_state_dict(model.classifier.state_dict())
    kept = {record.key: len(record.kept) for record in structure.paths}
    spectrum = {key: torch.linalg.svdvals(product) for key, product in products.items()}
    least = min(float(spectrum[key][count - 1]) for key, count in kept.items())
    dropped = [(float(spectrum[k][kept.get(k, 0)]), k) for k in products if kept.get(k, 0) < adapters_rank(folder, k)]
    left = structure.dense_params // 2 - structure.params
    costs = {key: sum(product.shape) for key, product in products.items()}
    assert all(value <= least + 1e-6 or costs[key] > left for value, key in dropped)
    with torch.no_grad():
        for key, count in kept.items():
            u, s, v = torch.linalg.svd(products[key])
            module = plain.get_submodule(key.split(":")[0].replace("/", "."))
            module.weight += (u[:, :count] * s[:count] @ v[:count]).float()
    torch.testing.assert_close(output(model, batch), output(plain, batch), atol=1e-5, rtol=0)


def adapters_rank(folder: Path, key: str) -> int:
    name = key.split(":")[0].replace("/", ".")
    return len(load_file(folder / WEIGHTS)[f"base_model.model.{name}.lora_A.weight"])


def test_a_searched_import_keeps_the_budget_and_goes_back_to_peft(
    tmp_path: Path, bert_folder: tuple[Path, Tensor, dict[str, Tensor]]
) -> None:
    folder, _, batch = bert_folder
    model, _ = tiny("bert", head="classification")
    adapters = ga.import_peft(model, folder, gates=ga.GateConfig(levels=("path", "rank")))
    adapters.set_penalty(ga.Budget(fraction=0.25), total_steps=12)
    groups = [
        {"params": [*adapters.weight_parameters(), *adapters.head_parameters()], "lr": 1e-2},
        {"params": adapters.gate_parameters(), "lr": 0.5},
    ]
    optimizer = torch.optim.Adam(groups)
    model.train()
    for _ in range(12):
        (model(**batch, labels=torch.tensor([0, 1])).loss + adapters.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    structure = adapters.compact()
    model.eval()
    assert 0 < structure.params <= structure.dense_params / 4
    ga.export_peft(adapters, tmp_path / "small")
    small = sum(v.numel() for n, v in load_file(tmp_path / "small" / WEIGHTS).items() if "lora_" in n)
    assert small == structure.params
    found = output(loaded_by_peft(tiny("bert", head="classification")[0], tmp_path / "small"), batch)
    torch.testing.assert_close(found, output(model, batch), atol=1e-5, rtol=0)


def test_an_export_comes_back(tmp_path: Path) -> None:
    model, batch = tiny("llama", head="lm")
    adapters = compacted(model, batch)
    ga.export_peft(adapters, tmp_path / "peft")
    other, _ = tiny("llama", head="lm")
    again = ga.import_peft(other, tmp_path / "peft")
    torch.testing.assert_close(output(other, batch), output(model, batch), atol=1e-5, rtol=0)
    assert adapters.structure is not None
    assert again.compact().params == adapters.structure.params


def test_an_export_knows_its_backbone_by_its_values(tmp_path: Path) -> None:
    adapters = compacted(*tiny("bert", head="classification"))
    ga.export_peft(adapters, tmp_path / "peft")
    updated, _ = tiny("bert", head="classification", seed=1)
    refused(updated, tmp_path / "peft", ["other weights", "values ", "base='updated'"])
    ga.import_peft(updated, tmp_path / "peft", base="updated")
    retrained, _ = tiny("bert", head="classification")
    nn.init.zeros_(retrained.classifier.weight)  # a head comes with the LoRA and is none of the backbone
    ga.import_peft(retrained.bfloat16(), tmp_path / "peft")


def test_reading_needs_no_peft(
    bert_folder: tuple[Path, Tensor, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it now fails
    ga.import_peft(tiny("bert", head="classification")[0], bert_folder[0])


# -- what is refused ---------------------------------------------------------------------------------------------------


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}


def configured(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(data | changes))

    change.__name__ = "_".join(changes)
    return change


def added(name: str, *shape: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_file({**tensors_of(folder), f"base_model.model.{name}": torch.ones(shape)}, folder / WEIGHTS)

    change.__name__ = name.rpartition(".")[2]
    return change


def truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def cut_in_the_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:40])


class Bomb:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.folder / "exploded",)


def pickled_under_the_right_name(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(folder)))


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(folder)))


def weights_absent(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def configuration_absent(folder: Path) -> None:
    (folder / CONFIG).unlink()


def configuration_truncated(folder: Path) -> None:
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:50])


def configuration_of_something_else(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        save_file({name.replace(old, new): value for name, value in tensors_of(folder).items()}, folder / WEIGHTS)

    change.__name__ = f"{old}_becomes_{new}"
    return change


def revalued(part: str, rule: Callable[[Tensor], Tensor], called: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = {name: rule(value) if part in name else value for name, value in tensors_of(folder).items()}
        save_file(found, folder / WEIGHTS)

    change.__name__ = called
    return change


def module_missing(folder: Path) -> None:
    save_file({n: v for n, v in tensors_of(folder).items() if QUERY not in n}, folder / WEIGHTS)


of_another_width = revalued("query.lora_A", lambda value: torch.cat([value, value], 1), "of_another_width")
not_finite = revalued("query.lora_A", lambda value: value * math.nan, "not_finite")
whole_numbers = revalued("", Tensor.int, "whole_numbers")
head_of_another_size = revalued("classifier.bias", lambda value: torch.ones(7), "head_of_another_size")
moved_to_another_block = renamed(QUERY, "layer.7.attention.self.query")
moved_to_another_map = renamed(QUERY, "layer.1.attention.self.key")
half_renamed = renamed(f"{QUERY}.lora_A", "layer.1.query.lora_A")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncated, ["cannot be read", "truncated or foreign", WEIGHTS]),
        (cut_in_the_header, ["cannot be read", "40 bytes that are truncated or foreign"]),
        (pickled, ["adapter_model.bin, a pickled file", "never opened", "safetensors"]),
        (pickled_under_the_right_name, ["a pickled file", "never opened"]),
        (weights_absent, ["the weights are missing", WEIGHTS]),
        (configuration_absent, ["not a peft adapter", f"no {CONFIG} in it"]),
        (configuration_truncated, ["cannot be read", "a JSON object", CONFIG]),
        (configuration_of_something_else, ["adapters of this type are not imported", "list"]),
        (half_renamed, ["half of a LoRA", "lora_A", "lora_B", "query"]),
        (moved_to_another_block, ["another model", "layer.7.attention.self.query", "base_model_name_or_path"]),
        (moved_to_another_map, ["does not target", "layer.1.attention.self.key"]),
        (module_missing, ["another model", "weights for bert.encoder.layer.1.attention.self.query, which it targets"]),
        (of_another_width, ["another model", "query: 64 -> 32", "32 -> 32"]),
        (not_finite, ["no finite number", "query.lora_A"]),
        (whole_numbers, ["no finite number", "torch.int32"]),
        (head_of_another_size, ["heads are not those", "classifier.bias (7,)", "(3,)", "number of classes"]),
        (configured(r=4), ["another rank", "rank 4", "rank 3", "query"]),
        (configured(r=None), ["r: Input should be a valid integer"]),
        (configured(peft_type="IA3"), ["more than a plain IA3 adapter", "unset"]),
        (
            configured(peft_type="PREFIX_TUNING"),
            ["of this type are not imported", "PREFIX_TUNING", "merge_and_unload", "prompts cannot"],
        ),
        (configured(peft_type=None, model_class="BertAdapterModel"), ["of this type", "read with import_adapterhub"]),
        (configured(bias="all"), ["more than a plain LORA adapter", "bias: 'all'", "part of the backbone"]),
        (configured(use_dora=True), ["other parts", "use_dora: True", "got:      none"]),
        (configured(target_parameters=["mlp.experts.gate_up_proj"]), ["another model", "mlp.experts.gate_up_proj"]),
        (configured(layer_replication=[[0, 1]]), ["layer_replication"]),
        (configured(shape_of_the_future=1), ["shape_of_the_future: 1", "train the adapter without it"]),
        (configured(init_lora_weights="pissa"), ["changed its backbone", "pissa", "path_initial_model"]),
        (configured(modules_to_save=None), ["no place in such an adapter", "classifier", "a trained bias"]),
        (
            added("bert.embeddings.word_embeddings.lora_embedding_A", 3, 99),
            ["half of a LoRA", "lora_A alone", "word_embeddings"],
        ),
        (added("bert.encoder.layer.0.attention.self.query.lora_magnitude_vector", 32), ["other parts", "a magnitude"]),
        (added("bert.encoder.layer.0.attention.self.query.lora_B.bias", 32), ["a bias of lora_B"]),
        (added("bert.encoder.layer.0.attention.self.smuggled", 32), ["smuggled", "a key of no LORA adapter"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_foreign_or_damaged_folder_is_refused_and_the_model_left_alone(
    tmp_path: Path,
    bert_folder: tuple[Path, Tensor, dict[str, Tensor]],
    damage: Callable[[Path], None],
    says: list[str],
) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    for name in (WEIGHTS, CONFIG):
        (folder / name).write_bytes((bert_folder[0] / name).read_bytes())
    damage(folder)
    model, _ = tiny("bert", head="classification")
    refused(model, folder, says)
    assert not (folder / "exploded").exists()


@pytest.mark.parametrize("inside", [".", "adapter"])
def test_an_adapter_of_our_own_is_sent_to_its_own_reader(tmp_path: Path, inside: str) -> None:
    model, _ = tiny("bert", head="classification")
    adapters = ga.attach(model, "lora-all-linear")
    adapters.compact()
    adapters.save(tmp_path / inside)
    adapters.detach()
    refused(model, tmp_path, ["not a peft adapter", "that this library saved", "load_adapters", "gatedadapters export"])
    refused(model, tmp_path / "none", ["not a peft adapter", "no such folder", "check the path"])
    with pytest.raises(ArtifactError, match=r"not a folder of AdapterHub[\s\S]*load_adapters"):
        ga.import_adapterhub(model, tmp_path)
    with pytest.raises(ArtifactError, match=r"not a peft adapter[\s\S]*gatedadapters export"):
        ga.normalise(tmp_path, tmp_path / "new")


CATASTROPHIC = r"(.*|(\w|\.)+)+!"


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": CATASTROPHIC},
        {"target_modules": r"(a+)\1"},
        {"rank_pattern": {CATASTROPHIC: 3}},
        {"alpha_pattern": {CATASTROPHIC: 3}},
        {"modules_to_save": [CATASTROPHIC]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_catastrophic_regular_expression_is_answered_at_once(
    tmp_path: Path, bert_folder: tuple[Path, Tensor, dict[str, Tensor]], change: dict[str, Any]
) -> None:
    folder = tmp_path / "lora"
    shutil.copytree(bert_folder[0], folder)
    configured(**change)(folder)
    model, _ = tiny("bert", head="classification")
    start = time.process_time()
    with suppress(ArtifactError):  # a pattern that matches nothing is no mistake
        ga.import_peft(model, folder)
    assert time.process_time() - start < 2


def refused(model: nn.Module, folder: Path, says: list[str]) -> None:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(ArtifactError) as caught:
        ga.import_peft(model, folder)
    for part in [*says, "expected:", "got:", "where:", "fix:", str(folder)]:
        assert part in str(caught.value)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == grads
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_another_backbone_is_refused(tmp_path: Path, bert_folder: tuple[Path, Tensor, dict[str, Tensor]]) -> None:
    refused(
        tiny("llama", head="lm")[0], bert_folder[0], ["another model", "bert.encoder.layer.0", "a LlamaForCausalLM"]
    )
    refused(tiny("bert")[0], bert_folder[0], ["another model", "a BertModel without them"])
    with pytest.raises(ArtifactError, match=r"no such folder"):
        ga.import_peft(tiny("bert")[0], tmp_path / "nowhere")


def test_a_saved_module_that_is_tied_here_is_refused(tmp_path: Path) -> None:
    saved_by_peft(tmp_path, "llama", "lm", modules_to_save=["lm_head"])
    model, _ = tiny("llama", head="lm")
    model.lm_head.weight = model.model.embed_tokens.weight
    refused(model, tmp_path, ["tied to another", "lm_head.weight", "tie_word_embeddings=False"])


def test_importing_onto_adapters_is_refused(bert_folder: tuple[Path, Tensor, dict[str, Tensor]]) -> None:
    model, _ = tiny("bert", head="classification")
    ga.attach(model, space())
    with pytest.raises(AttachError, match="already has adapters"):
        ga.import_peft(model, bert_folder[0])
