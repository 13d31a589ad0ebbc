"""What a space reaches is counted as a reader would by hand, and every remedy it names works."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import nn

import gatedadapters as ga
from gatedadapters import experiments
from gatedadapters.errors import LayoutError
from gatedadapters.supernet.reach import Reach
from gatedadapters.testing import tiny

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def make(family: str) -> nn.Module:
    """A tiny classifier of a family that keeps weights in forms of its own."""
    if family == "XLNet":
        config = transformers.XLNetConfig(vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=64)
        return transformers.XLNetForSequenceClassification(config)
    if family == "Funnel":
        sizes = {"block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64}
        return transformers.FunnelForSequenceClassification(transformers.FunnelConfig(vocab_size=99, **sizes))
    config = transformers.SqueezeBertConfig(vocab_size=99, embedding_size=32, **SIZES)
    return transformers.SqueezeBertForSequenceClassification(config)


def reach_of(adapters: Any) -> Reach:
    assert isinstance(adapters.reach, Reach)
    return adapters.reach


def test_the_counts_are_those_of_the_model_and_the_remedy_reaches_the_rest() -> None:
    model, _ = tiny("llama", head="lm")
    matrices = {name: m.weight.numel() for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    reach = reach_of(ga.attach(model, "lora-all-linear"))
    assert reach.blocks == (3, 3)
    assert reach.matrices == (len(matrices) - 1, len(matrices))
    assert reach.elements == (sum(matrices.values()) - matrices["lm_head"], sum(matrices.values()))
    (left,) = reach.left
    assert (left.role, left.elements) == ("outside.head", matrices["lm_head"])
    path = yaml.safe_load(left.remedy.removeprefix("add a path "))
    space = ga.SearchSpace.load("lora-all-linear").model_dump()
    model, _ = tiny("llama", head="lm")
    whole = reach_of(ga.attach(model, ga.SearchSpace.model_validate({**space, "paths": [*space["paths"], path]})))
    assert whole.matrices == (len(matrices), len(matrices))
    assert not whole.left
    assert whole.table() == ""


def test_each_expert_counts_and_a_part_of_the_blocks_is_a_part() -> None:
    model, _ = tiny("mixtral")
    reach = reach_of(ga.attach(model, "lora-all-linear"))
    assert reach.matrices == (26, 26)
    first = {"kind": "lora", "at": {"blocks": [0], "roles": ["q"]}}
    model, _ = tiny("mixtral")
    reach = reach_of(ga.attach(model, ga.SearchSpace.model_validate({"name": "first", "paths": [first]})))
    assert reach.blocks == (1, 2)
    assert reach.matrices == (1, 26)
    assert sum(left.matrices for left in reach.left) == 25


def test_a_plan_says_the_same_as_attaching_and_prints_it() -> None:
    model, _ = tiny("bert")
    plan = experiments.plan(model, "encoder-mixed")
    assert plan.reach == ga.attach(model, "encoder-mixed").reach
    assert plan.reach.summary in str(plan)
    assert plan.to_data()["reach"]["blocks"] == {"reached": 3, "of": 3}


def test_maps_for_global_attention_are_reached_with_a_sample_that_has_some(caplog: pytest.LogCaptureFixture) -> None:
    stacks = {
        f"{stack}_{name}": value
        for stack in ("encoder", "decoder")
        for name, value in {"layers": 1, "attention_heads": 4, "ffn_dim": 64}.items()
    }
    config = transformers.LEDConfig(vocab_size=99, d_model=32, attention_window=4, **stacks)
    model = transformers.LEDModel(config)
    reach = reach_of(ga.attach(model, "lora-all-linear"))
    assert len(reach.left) == 3
    assert all("global_attention_mask" in left.reason and "sample=" in left.remedy for left in reach.left)
    assert "not reached: encoder.layers.#" in caplog.text
    ga.detach(model)
    ids = torch.randint(3, 99, (1, 8))
    marked = torch.zeros_like(ids)
    marked[:, 0] = 1
    sample = {"input_ids": ids, "decoder_input_ids": ids, "global_attention_mask": marked}
    assert not reach_of(ga.attach(model, "lora-all-linear", sample)).left


@pytest.mark.parametrize(
    ("family", "weight"),
    [
        ("XLNet", "transformer.layer.0.rel_attn.q"),
        ("Funnel", "funnel.encoder.blocks.0.0.attention.r_kernel"),
        ("SqueezeBert", "transformer.encoder.layers.0.attention.query.weight"),
    ],
)
def test_weights_that_are_no_matrices_are_tuned_by_elements_as_the_remedy_says(family: str, weight: str) -> None:
    model = make(family)
    if family == "SqueezeBert":
        with pytest.raises(LayoutError, match=r"ga\.apply_mask"):
            ga.attach(model, "encoder-mixed")
    else:
        reach = reach_of(ga.attach(model, "encoder-mixed"))
        ga.detach(model)
        (remedy,) = {left.remedy for left in reach.left if "rel_attn.q" in left.role or "r_kernel" in left.role}
        assert "ga.apply_mask" in remedy
    batch = {"input_ids": torch.randint(3, 99, (2, 8)), "labels": torch.tensor([0, 1])}
    mask = ga.select(ga.score(model, [batch], kind="taylor"), density=0.5, include=[weight])
    assert mask.names == (weight,)
    before = model.get_parameter(weight).detach().clone()
    delta = ga.apply_mask(model, mask)
    optimizer = torch.optim.SGD(list(delta.parameters()), lr=1.0)
    model(**batch).loss.backward()
    optimizer.step()
    owner, _, name = weight.rpartition(".")
    assert not torch.equal(getattr(model.get_submodule(owner), name), before)
    delta.remove()
    assert torch.equal(model.get_parameter(weight), before)
