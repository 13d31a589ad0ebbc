"""A QLoRA user's way: a search over 4 or 8 bits, then the result on those, on the original, merged, and in peft."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import gatedadapters as ga
from gatedadapters.backbone.fingerprint import backbone_fingerprint
from gatedadapters.backbone.quantized import dequantized, is_quantized
from gatedadapters.errors import ArtifactError, AttachError, MaskError
from gatedadapters.testing import tiny
from gatedadapters.testing.helpers import awaken

torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed; see the extra 'quantised'")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; see the extra 'quantised'")
PACKS = bitsandbytes.functional.has_avx512bf16()

BNB = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-in-bf16": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
    "int8": {"load_in_8bit": True},
}
SCHEMES = [*BNB, "torchao-int8", "torchao-int4"]


def original(**changes: Any) -> tuple[Any, dict[str, Tensor]]:
    """Wide enough for blocks of 64 values, and for several blocks a row."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
    return tiny("llama", head="lm", **sizes, **changes)


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    folder = tmp_path_factory.mktemp("original")
    original()[0].save_pretrained(folder)

    def quantized(scheme: str) -> Any:
        if scheme in BNB:
            config = BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **BNB[scheme])
            return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        model = AutoModelForCausalLM.from_pretrained(folder)
        groups = torchao.granularity.PerGroup(32) if scheme == "torchao-int4" else None
        torchao.quantize_(
            model,
            torchao.Int8WeightOnlyConfig()
            if groups is None
            else torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=groups),
        )
        return model

    return quantized


@cache
def batch() -> dict[str, Tensor]:
    return original()[1]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**batch()).logits


def written_out(model: nn.Module) -> Any:
    """The original with the rounded values of a quantised model."""
    twin = original()[0]
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            owner, _, leaf = name.rpartition(".")
            value = dequantized(model.get_submodule(owner), leaf)
            assert value is not None
            parameter.copy_(value)
    return twin


def loss_of(model: nn.Module) -> Tensor:
    return model(**batch(), labels=batch()["input_ids"]).loss


def searched(model: nn.Module, space: Any = "decoder-mixed") -> ga.Adapters:
    """Adapters after a few steps of a search, with a prune in it."""
    adapters = ga.attach(model, space, batch(), penalty=ga.Budget(fraction=0.25), total_steps=6)
    awaken(adapters)
    optimizer = torch.optim.AdamW([*adapters.weight_parameters(), *adapters.gate_parameters()], lr=0.01)
    model.train()
    for _ in range(6):
        (loss_of(model) + adapters.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return adapters


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_search_over_it_loads_on_it_and_on_the_original(
    scheme: str, load: Callable[[str], Any], tmp_path: Path
) -> None:
    model = load(scheme)
    assert any(is_quantized(parameter) for parameter in model.parameters())
    assert ga.discover(model, batch()) == ga.discover(original()[0], batch())
    adapters = searched(model)
    adapters.compact()
    adapters.save(tmp_path / "out")
    expected = logits(model)
    again = load(scheme)
    ga.load_adapters(again, tmp_path / "out")
    assert torch.equal(logits(again), expected)
    full = original()[0]
    moved = ga.load_adapters(full, tmp_path / "out")
    exact = written_out(model)
    ga.load_adapters(exact, tmp_path / "out")
    torch.testing.assert_close(logits(exact), expected, rtol=2e-2, atol=2e-2)
    assert not torch.equal(logits(full), expected)
    moved.save(tmp_path / "from-the-original")  # its origin is still the quantised one
    ga.load_adapters(load(scheme), tmp_path / "from-the-original")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_adapters_of_the_original_load_on_it(scheme: str, load: Callable[[str], Any], tmp_path: Path) -> None:
    full = original()[0]
    adapters = searched(full)
    adapters.compact()
    adapters.save(tmp_path / "out")
    loaded = ga.load_adapters(load(scheme), tmp_path / "out")
    assert not loaded.structure.lineage  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_those_over_the_rounded_weights(scheme: str, load: Callable[[str], Any]) -> None:
    model = load(scheme)
    logits(model)  # a call in evaluation mode, after which bitsandbytes' kernel has no gradient
    found = []
    for each in (model, written_out(model)):
        adapters = ga.attach(each, "decoder-mixed", batch())
        awaken(adapters)
        logits(each)
        loss_of(each).backward()
        found.append(torch.cat([p.grad.flatten() for p in adapters.weight_parameters() if p.grad is not None]))
    assert (found[0] - found[1]).norm() < 0.05 * found[1].norm()


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_call_that_repacks_the_weights_makes_no_other_base_of_it(scheme: str, load: Callable[[str], Any]) -> None:
    model = load(scheme)
    first = backbone_fingerprint(model)
    logits(model)
    for each in (model, copy.deepcopy(model), load(scheme)):
        after = backbone_fingerprint(each)
        assert (after.values, after.shapes, after.exact) == (first.values, first.shapes, first.exact)
        assert after.is_quantization_of(first)  # packing rounds scales


@pytest.mark.skipif(not PACKS, reason="this CPU has no bfloat16 arithmetic, so bitsandbytes packs nothing")
def test_packing_is_off_while_something_is_attached_and_on_again_afterwards(load: Callable[[str], Any]) -> None:
    model = load("nf4-in-bf16")
    linear = model.model.layers[0].mlp.down_proj

    def packed() -> bool:
        return getattr(linear.weight.quant_state, "packing_format_for_cpu", False)

    before = dequantized(linear)
    logits(model)
    assert packed()
    ga.attach(model, "decoder-mixed", batch())
    torch.testing.assert_close(dequantized(linear), before, rtol=1e-2, atol=1e-3)
    logits(model)
    assert not packed()
    ga.detach(model)
    logits(model)
    assert packed()
    with pytest.raises(AttachError):
        ga.attach(model, "decoder-mixed", batch(), heads=["none"])
    logits(model)
    assert packed()


@pytest.mark.parametrize("scheme", ["nf4", "torchao-int8"])
def test_another_base_is_refused_in_either_precision(scheme: str, load: Callable[[str], Any], tmp_path: Path) -> None:
    adapters = searched(load(scheme))
    adapters.compact()
    adapters.save(tmp_path / "out")

    def changed(name: str, factor: float) -> Any:
        model = original()[0]
        model.get_parameter(name).data.mul_(factor)
        return model

    others = [original(seed=1)[0], changed("model.norm.weight", 1.1), changed("model.layers.1.mlp.up_proj.weight", -1)]
    for other in others:
        with pytest.raises(ArtifactError, match="values of parameters"):
            ga.load_adapters(other, tmp_path / "out")
        with pytest.raises(ArtifactError, match="values of parameters"):
            ga.merge_into(other, tmp_path / "out")
    tampered = backbone_fingerprint(original()[0]).model_dump() | {"samples": "?"}
    with pytest.raises(ValueError, match="samples"):
        type(backbone_fingerprint(original()[0])).model_validate(tampered)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_merge_goes_into_the_original_in_one_call(scheme: str, load: Callable[[str], Any], tmp_path: Path) -> None:
    model = load(scheme)
    adapters = searched(model, "lora-all-linear")
    adapters.compact()
    adapters.save(tmp_path / "out")
    with pytest.raises(AttachError, match=r"merge_into"):
        adapters.merge()
    attached = original()[0]
    ga.load_adapters(attached, tmp_path / "out")
    for given in (adapters, tmp_path / "out"):
        merged = original()[0]
        assert ga.merge_into(merged, given).worst < 1e-4
        torch.testing.assert_close(logits(merged), logits(attached), rtol=1e-3, atol=1e-4)
        assert not hasattr(merged, "gated_adapters")
    assert ga.get_adapters(model) is adapters


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_peft_computes_the_same_over_it(scheme: str, load: Callable[[str], Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = load(scheme)
    adapters = searched(model, "lora-all-linear")
    adapters.compact()
    ga.export_peft(adapters, tmp_path / "peft")
    theirs = peft.PeftModel.from_pretrained(load(scheme), tmp_path / "peft")
    for name in ("training", "evaluation"):  # int8 rounds activations in evaluation alone
        ours = (model.train() if name == "training" else model.eval())(**batch()).logits
        other = (theirs.train() if name == "training" else theirs.eval())(**batch()).logits
        torch.testing.assert_close(other, ours, rtol=2e-2, atol=2e-2)
    imported = ga.import_peft(original()[0], tmp_path / "peft", batch())
    assert imported.identity.is_quantization_of(adapters.identity)


def test_vectors_are_scored_and_tuned_beside_packed_weights(load: Callable[[str], Any]) -> None:
    model = load("nf4")
    rows = [batch() | {"labels": batch()["input_ids"]}]
    with pytest.raises(MaskError, match="without quantisation"):
        ga.score(model, rows)
    scores = ga.score(model, rows, include=["norm"])
    twin = ga.score(written_out(model), rows, include=["norm"])
    for name in scores.names:
        torch.testing.assert_close(scores[name], twin[name], rtol=5e-2, atol=1e-4)
    delta = ga.apply_mask(model, ga.select(scores, protect=0.5))
    loss_of(model).backward()
    assert all(values.grad is not None and values.grad.any() for values in delta.parameters())
