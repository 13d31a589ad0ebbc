"""What `norm` and `bias` do beyond the contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gatedadapters as ga
from gatedadapters.backbone import discover
from gatedadapters.errors import AttachError, PathError
from gatedadapters.paths import Site, SkippedSite
from gatedadapters.paths.bias import BiasOptions
from gatedadapters.paths.norm import Norm, NormOptions
from gatedadapters.testing import tiny
from gatedadapters.testing.helpers import awaken, output_of, random_loss


def attached(model: nn.Module, batch: Any, *options: Any) -> Any:
    """Compact, awakened adapters of every site that the options select."""
    structure = ga.attach(model, ga.SearchSpace(paths=options), batch).discretize()
    ga.detach(model)
    adapters = ga.attach(model, structure)
    awaken(adapters)
    return adapters


@pytest.mark.parametrize("family", ["bert", "gpt2", "gemma", "gemma2", "qwen3", "phimoe", "t5", "mamba2"])
def test_norms_merge_into_their_own_gains_and_shifts(family: str) -> None:
    """RMSNorm, LayerNorm, Gemma's gains minus 1, norms of queries and keys, gated norms."""
    model, batch = tiny(family)
    adapters = attached(model, batch, NormOptions())
    expected, before = output_of(model, batch), {n: p.clone() for n, p in model.named_parameters()}
    merged = adapters.merge()
    torch.testing.assert_close(output_of(model, batch), expected, rtol=1e-4, atol=1e-5)
    changed = {name for name, value in before.items() if not torch.equal(value, model.get_parameter(name))}
    assert changed == set(merged.drift)
    assert {name.rpartition(".")[0] for name in changed} == {path.site.write.module for path in adapters.paths.values()}


def test_a_gain_moves_as_the_norms_own_gain_does() -> None:
    """Outside oracle: autograd of the norm's own weight and bias."""
    model, batch = tiny("bert")
    random_loss(model, batch).backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    space = ga.SearchSpace(paths=(NormOptions(),), gates={"stochastic": False, "init": 4.0, "init_spread": 0.0})
    adapters = ga.attach(model, space, batch)
    random_loss(model, batch).backward()
    for path in adapters.paths.values():
        name = path.site.write.module
        # d/ds of h (1 + s) is that of the gain times the gain, plus that of the shift times the shift
        through_gain = own[f"{name}.weight"] * weights[f"{name}.weight"] + own[f"{name}.bias"] * weights[f"{name}.bias"]
        torch.testing.assert_close(path.gain.grad, through_gain, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(path.shift.grad, own[f"{name}.bias"], rtol=1e-3, atol=1e-4)


def test_all_norms_are_selected_and_counted_also_outside_the_blocks() -> None:
    model, batch = tiny("llama")
    adapters = ga.attach(model, ga.SearchSpace(paths=(NormOptions(),)), batch)
    norms = [p for name, p in model.named_parameters() if "norm" in name and "gated_adapters" not in name]
    assert sum(p.numel() for p in adapters.paths.parameters()) == sum(p.numel() for p in norms) == 7 * 32


@pytest.mark.parametrize(
    ("where", "names"),
    [
        ({"sublayers": ("outside",)}, {"norm"}),
        ({"sublayers": ("feed_forward",), "blocks": (-1,)}, {"layers.2.post_attention_layernorm"}),
        ({"roles": ("q_norm",), "blocks": (0,)}, {"layers.0.self_attn.q_norm"}),
    ],
)
def test_norms_are_selected_by_sublayer_block_and_role(where: dict[str, Any], names: set[str]) -> None:
    options = NormOptions.model_validate({"at": where})
    sites = [site for site in Norm.sites(options, discover(*tiny("qwen3"))) if isinstance(site, Site)]
    assert {site.write.module for site in sites} == names


def test_gains_alone_leave_the_shifts() -> None:
    both, gains = (ga.attach(tiny("bert")[0], ga.SearchSpace(paths=(NormOptions(shift=s),))) for s in (True, False))
    assert sum(p.numel() for p in both.paths.parameters()) == 2 * sum(p.numel() for p in gains.paths.parameters())
    assert all(not hasattr(path, "shift") for path in gains.paths.values())


class Block(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.mix = norm, nn.Linear(6, 6)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.mix(self.norm(hidden_states))


class Net(nn.Module):
    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(norm()) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        for block in self.blocks:
            x = block(x)
        return (x,)


class Peculiar(nn.Module):
    """A norm of a user's own, whose weight acts in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight.exp()


def test_norms_over_channels_are_skipped_by_name() -> None:
    sites = list(Norm.sites(NormOptions(), discover(Net(lambda: nn.GroupNorm(2, 6)), {"x": torch.randn(4, 6)})))
    assert [site.module for site in sites if isinstance(site, SkippedSite)] == ["blocks.0.norm", "blocks.1.norm"]
    assert len(sites) == 2


@pytest.mark.parametrize(
    ("norm", "where", "offered"),
    [(nn.Identity, {}, "feed_forward.other"), (lambda: nn.LayerNorm(6), {"roles": ("q_norm",)}, "feed_forward.norm")],
)
def test_a_kind_without_a_place_is_one_error_and_the_model_stays_as_it_was(norm: Any, where: Any, offered: str) -> None:
    model, option = Net(norm), NormOptions.model_validate({"at": where})
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with pytest.raises(PathError, match=r"selects no point") as caught:
        ga.attach(model, ga.SearchSpace(paths=(option,)), {"x": torch.randn(2, 3, 6)})
    assert offered in str(caught.value)
    assert not hasattr(model, "gated_adapters")
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.requires_grad for p in model.parameters())


def test_a_norm_that_uses_its_weight_in_a_way_of_its_own_is_adapted_but_not_merged() -> None:
    model, batch = Net(Peculiar), {"x": torch.randn(2, 3, 6)}
    before = output_of(model, batch)
    adapters = attached(model, batch, NormOptions())
    assert not torch.equal(output_of(model, batch), before)
    with pytest.raises(AttachError, match=r"blocks\.\d\.norm"):
        adapters.merge()


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_biases_merge_into_the_maps_biases(family: str, side: Any) -> None:
    model, batch = tiny(family)
    adapters = attached(model, batch, BiasOptions(side=side), ga.SearchSpace.load("encoder-mixed").paths[0])
    expected = output_of(model, batch)
    merged = adapters.merge()
    torch.testing.assert_close(output_of(model, batch), expected, rtol=1e-4, atol=1e-5)
    assert {name.rpartition(".")[2] for name in merged.drift} == {"weight", "bias"}


def test_scales_and_biases_at_one_input_merge_in_the_order_in_which_they_run() -> None:
    model, batch = tiny("bert")
    options = ga.SearchSpace.load("encoder-mixed").paths
    scale = next(o for o in options if o.kind == "scale").model_copy(update={"side": "input", "at": options[0].at})
    adapters = attached(model, batch, BiasOptions(side="input"), scale, BiasOptions(), NormOptions())
    expected = output_of(model, batch)
    adapters.merge()
    torch.testing.assert_close(output_of(model, batch), expected, rtol=1e-4, atol=1e-4)


def test_a_merge_into_a_map_without_a_bias_is_refused_with_the_way_out_and_changes_nothing() -> None:
    model, batch = tiny("llama")
    adapters = attached(model, batch, BiasOptions())
    expected, state = output_of(model, batch), {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(AttachError, match="without a bias"):
        adapters.merge()
    assert torch.equal(output_of(model, batch), expected)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in state.items())


def test_a_small_factor_is_not_lost_in_bfloat16() -> None:
    """In bfloat16 1.003 is 1; the product is rounded once."""
    site = next(site for site in Norm.sites(NormOptions(), discover(*tiny("bert"))) if isinstance(site, Site))
    path = Norm(site, NormOptions())
    with torch.no_grad():
        path.gain.fill_(0.003)
    target = torch.randn(4000, site.width_out).bfloat16()
    exact = target.double() * 1.003
    drift = (path(target, target, None).double() - exact).abs().sum()
    assert drift < (target.double() - exact).abs().sum()
