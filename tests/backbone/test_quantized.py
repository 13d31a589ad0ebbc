"""A backbone whose weights torchao holds as int8 lies frozen under adapters like any other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatedadapters as ga
from gatedadapters.backbone.fingerprint import fingerprint
from gatedadapters.backbone.quantized import is_quantized, parts
from gatedadapters.errors import ArtifactError, AttachError
from gatedadapters.testing import tiny
from gatedadapters.testing.helpers import awaken

torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed; see the extra 'quantised'")


def int8(family: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model with int8 weights; fused experts stay in float, as torchao leaves them."""
    model, batch = tiny(family)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert any(is_quantized(p) for p in model.parameters())
    return model, batch


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}#{i}": part.clone() for name, value in model.state_dict().items() for i, part in enumerate(parts(value))
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def attached(model: nn.Module, batch: dict[str, Tensor]) -> ga.Adapters:
    adapters = ga.attach(model, "decoder-mixed", batch)
    awaken(adapters)
    assert adapters.bank is not None
    with torch.no_grad():
        adapters.bank.log_alpha.uniform_(-1, 2, generator=torch.Generator().manual_seed(0))
    return adapters


@pytest.mark.parametrize("family", ["llama", "bert", "mixtral", "t5"])
def test_adapters_train_over_int8_weights_and_leave_every_bit(family: str) -> None:
    model, batch = int8(family)
    plain, _ = tiny(family)
    before, flags = bits(model), {name: p.requires_grad for name, p in model.named_parameters()}
    output = model.requires_grad_(False)(**batch)[0]  # torch multiplies what needs a gradient in another order
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[name])
    assert ga.discover(model, batch) == ga.discover(plain, batch)
    adapters = ga.attach(model, "decoder-mixed", batch)
    assert torch.equal(model(**batch)[0], output)
    attached_bits = bits(model)
    assert same(before, {k: v for k, v in attached_bits.items() if not k.startswith("gated_adapters.")})
    awaken(adapters)
    optimizer = torch.optim.AdamW([*adapters.weight_parameters(), *adapters.gate_parameters()], lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(**batch)[0][..., ::3].exp().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters.gate_parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("gated_adapters."))
    ga.detach(model)
    assert same(bits(model), before)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(model.requires_grad_(False)(**batch)[0], output)


def test_values_and_gradients_are_those_over_the_weights_written_out() -> None:
    model, batch = int8("llama")
    twin, _ = tiny("llama")
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            value = model.get_parameter(name)
            parameter.copy_(value.dequantize() if is_quantized(value) else value)
    results = []
    for each in (model, twin):
        adapters = attached(each, batch)
        output = each(**batch)[0]
        output.exp().mean().backward()
        results.append([output.detach(), *(p.grad for p in adapters.parameters() if p.grad is not None)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)


def test_copies_and_saved_adapters_round_trip(tmp_path: Path) -> None:
    model, batch = int8("llama")
    adapters = attached(model, batch)
    expected = model(**batch)[0]
    assert torch.equal(copy.deepcopy(model)(**batch)[0], expected)
    adapters.compact()
    expected = model(**batch)[0]
    adapters.save(tmp_path / "out")
    fresh, _ = int8("llama")
    ga.load_adapters(fresh, tmp_path / "out")
    assert torch.equal(fresh(**batch)[0], expected)
    other, _ = tiny("llama", seed=1)
    with pytest.raises(ArtifactError, match="values of parameters"):
        ga.load_adapters(other, tmp_path / "out")
    ga.load_adapters(other, tmp_path / "out", base="updated")


def test_the_fingerprint_sees_the_integers_of_a_weight() -> None:
    model, _ = int8("llama")
    first = fingerprint(model)
    parts(model.get_parameter("layers.1.mlp.up_proj.weight").data)[0][0, 0] ^= 64
    assert fingerprint(model).values != first.values
    assert fingerprint(model).shapes == first.shapes == fingerprint(tiny("llama")[0]).shapes


def test_a_scheme_that_lets_no_gradient_pass_is_refused_and_the_model_left_alone() -> None:
    model, batch = tiny("llama")
    torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
    before = bits(model)
    with pytest.raises(AttachError, match=r"quantisation(.|\n)*no gradient(.|\n)*q_proj(.|\n)*Int8Tensor(.|\n)*fix:"):
        ga.attach(model, "lora-all-linear", batch)
    assert same(bits(model), before)
    with pytest.raises(AttachError):
        ga.get_adapters(model)


class Packed(nn.Module):
    """What other libraries leave in the place of a linear module: integers, and a kernel that may not run here."""

    def __init__(self, linear: nn.Linear, *, broken: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.broken = linear.in_features, linear.out_features, broken
        self.scale = linear.weight.detach().abs().max() / 127
        integers = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            raise RuntimeError("no kernel for this device")
        return x @ (self.weight.to(x.dtype) * self.scale).t()


@pytest.mark.parametrize("broken", [False, True])
def test_other_schemes_are_judged_by_what_they_do(broken: bool) -> None:
    model, batch = tiny("llama")
    for block in model.layers:
        block.mlp.up_proj = Packed(block.mlp.up_proj, broken=broken)
    if broken:
        with pytest.raises(AttachError, match=r"no kernel for this device(.|\n)*up_proj, a Packed"):
            ga.attach(model, "lora-all-linear", batch)
        return
    output = model(**batch)[0]
    adapters: Any = ga.attach(model, "lora-all-linear", batch)
    assert torch.equal(model(**batch)[0], output)
    awaken(adapters)
    model(**batch)[0].exp().mean().backward()
    assert adapters.paths["layers/1/mlp/up_proj:lora"].up.grad.any()
    ga.detach(model)
    assert torch.equal(model(**batch)[0], output)


def test_a_path_that_would_change_a_packed_weight_is_refused_and_the_remedy_works() -> None:
    model, batch = tiny("mamba")
    adapters = ga.attach(model, "decoder-mixed", batch)
    at_weights = ga.SearchSpace(
        name="at weights", paths=tuple(o for o in adapters.space.paths if o.kind == "weight_lora")
    )
    ga.detach(model)
    structure = ga.attach(model, at_weights, batch).discretize()
    packed, _ = tiny("mamba")
    for block in packed.layers:
        block.mixer.dt_proj = Packed(block.mixer.dt_proj, broken=False)
    with pytest.raises(AttachError, match=r"packed one(.|\n)*dt_proj(.|\n)*llm_int8_skip_modules=\['dt_proj'"):
        ga.attach(packed, structure)
    for block, plain in zip(packed.layers, tiny("mamba")[0].layers, strict=True):
        block.mixer.dt_proj = plain.mixer.dt_proj
    ga.attach(packed, structure)
