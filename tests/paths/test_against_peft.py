"""LoRA and scale against peft's LoRA and IA3: same weights, same outputs, same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatedadapters import Adapters, GateConfig, SearchSpace, attach
from gatedadapters.config import Where
from gatedadapters.paths.lora import LoRAOptions
from gatedadapters.paths.scale import ScaleOptions
from gatedadapters.testing import tiny
from gatedadapters.testing.helpers import awaken

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name

OPEN = GateConfig(init=4.0, init_spread=0.0, stochastic=False)  # deterministic gate exactly 1


def random_loss(output: Tensor) -> Tensor:
    return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum()


def module_of(key: str) -> str:
    return key.split(":")[0].replace("/", ".")


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
@pytest.mark.parametrize("rank", [1, 5])
def test_lora_equals_pefts_lora(family: str, rank: int) -> None:
    model, batch = tiny(family)
    adapters = attach(model, SearchSpace(gates=OPEN, paths=(LoRAOptions(rank=rank),)), batch)
    awaken(adapters)
    twin, _ = tiny(family)
    targets = [module_of(key) for key in adapters.paths]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, fan_in_fan_out=family == "gpt2")
    theirs = peft.get_peft_model(twin, config).eval()
    layers = {key: theirs.base_model.model.get_submodule(module_of(key)) for key in adapters.paths}
    with torch.no_grad():
        for key, path in adapters.paths.items():
            layers[key].lora_A["default"].weight.copy_(path.down)
            layers[key].lora_B["default"].weight.copy_(path.up)

    ours, expected = model(**batch)[0], theirs(**batch)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    random_loss(ours).backward()
    random_loss(expected).backward()
    for key, path in adapters.paths.items():
        for name, own in (("lora_A", path.down), ("lora_B", path.up)):
            close_to(own.grad, getattr(layers[key], name)["default"].weight.grad, f"{key} {name}")
    merges_alike(adapters, theirs)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_scale_equals_pefts_ia3(family: str) -> None:
    model, batch = tiny(family)
    space = SearchSpace(
        gates=OPEN,
        paths=(
            ScaleOptions(side="output", at=Where(sublayers=("attention",), roles=("k", "v"))),
            ScaleOptions(side="input", at=Where(sublayers=("feed_forward",), roles=("down",))),
        ),
    )
    adapters = attach(model, space, batch)
    awaken(adapters)
    twin, _ = tiny(family)
    inner = [module_of(k) for k, p in adapters.paths.items() if p.site.write.side == "input"]
    config = peft.IA3Config(target_modules=[module_of(key) for key in adapters.paths], feedforward_modules=inner)
    theirs = peft.get_peft_model(twin, config).eval()
    factors: dict[str, nn.Parameter] = {}
    with torch.no_grad():
        for key, path in adapters.paths.items():
            layer: Any = theirs.base_model.model.get_submodule(module_of(key))
            factors[key] = layer.ia3_l["default"]
            factors[key].copy_((1 + path.shift).view_as(factors[key]))

    ours, expected = model(**batch)[0], theirs(**batch)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    random_loss(ours).backward()
    random_loss(expected).backward()
    for key, path in adapters.paths.items():
        close_to(path.shift.grad, factors[key].grad.flatten(), key)
    merges_alike(adapters, theirs)


def merges_alike(adapters: Adapters, theirs: Any) -> None:
    """Merged into the backbone, both give the same plain model."""
    model = adapters.model
    adapters.compact()
    report = adapters.merge_and_detach()
    state, expected = model.state_dict(), theirs.merge_and_unload().state_dict()
    assert state.keys() == expected.keys() > report.drift.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def close_to(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Equal up to float32 rounding at the scale of the tensor."""
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-4, f"{what}: relative error {error:.2g}"
