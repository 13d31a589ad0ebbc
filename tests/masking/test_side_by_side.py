"""Adapters and a delta in one model: who is trained, whoever comes or leaves first, and what a merge may change."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_recipes import assert_same_bits, loss_of, random_mask, snapshot
from torch import nn

import gatedadapters as ga
from gatedadapters.errors import AttachError, TrainingError
from gatedadapters.testing import tiny
from gatedadapters.testing.helpers import awaken

HEAD = ("classifier.bias", "classifier.weight")
FROZEN = "bert.embeddings.position_embeddings.weight"  # by the user, before anything of ours comes
SPACE = ga.SearchSpace.parse({"paths": [{"kind": "lora", "rank": 2, "at": {"roles": ["q", "v"]}}]}, where="here")


def classifier() -> tuple[Any, dict[str, torch.Tensor]]:
    model, batch = tiny("bert", head="classification")
    model.get_parameter(FROZEN).requires_grad_(False)
    return model, batch


def mask_for(model: nn.Module) -> ga.Mask:
    chosen = {n: torch.arange(2) for n, p in model.named_parameters() if n not in HEAD and p.dim() == 2}
    return ga.Mask.build(model, chosen, heads=frozenset(HEAD))


def both(first: str, **options: Any) -> tuple[Any, ga.Adapters, ga.SparseDelta]:
    """A classifier with adapters and a delta."""
    model, batch = classifier()
    mask = mask_for(model)
    if first == "adapters":
        adapters = ga.attach(model, SPACE, batch, **options)
        return model, adapters, ga.apply_mask(model, mask)
    delta = ga.apply_mask(model, mask)
    return model, ga.attach(model, SPACE, batch, **options), delta


def trained(model: nn.Module) -> set[str]:
    """Names of what requires gradients, beside what the library registered."""
    own = ("gated_adapters", "sparse_delta")
    return {n for n, p in model.named_parameters() if p.requires_grad and not n.startswith(own)}


def leave(model: nn.Module, who: str) -> None:
    if who == "adapters":
        ga.detach(model)
    else:
        ga.get_delta(model).remove()


@pytest.mark.parametrize("leaver", ["adapters", "delta"])
@pytest.mark.parametrize("first", ["adapters", "delta"])
def test_the_backbone_stays_frozen_until_the_last_one_leaves(first: str, leaver: str) -> None:
    untouched, batch = classifier()
    model, adapters, delta = both(first)
    wanted, attributes = trained(untouched), set(vars(untouched))
    tuned = {name for name, _ in delta.items()}
    assert trained(model) == set(HEAD)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    twins = [copy.deepcopy(model), torch.load(stream, weights_only=False)]
    for one in (model, *twins):
        leave(one, leaver)
        assert trained(one) == set(HEAD)
        left = adapters if leaver == "delta" else delta
        if one is model:
            assert all(p.requires_grad for p in left.parameters())
        frozen = {n: v for n, v in snapshot(one).items() if n not in HEAD and not n.startswith("gated")}
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, weight_decay=0.1)  # given everything
        loss_of(one, batch).backward()
        optimizer.step()
        leave(one, "adapters" if leaver == "delta" else "delta")
        after = snapshot(one)
        assert [n for n in frozen if n not in tuned and not torch.equal(after[n], frozen[n])] == []
        assert trained(one) == wanted == trained(untouched)
        assert set(vars(one)) == attributes
        assert set(one._modules) == set(untouched._modules)


@pytest.mark.parametrize("first", ["adapters", "delta"])
def test_heads_are_trained_as_long_as_somebody_asks_for_it(first: str) -> None:
    model, batch = classifier()
    mask = mask_for(model)
    bare = ga.Mask.build(model, {n: torch.arange(2) for n in mask.names})  # of a backbone with its head
    if first == "adapters":
        ga.attach(model, SPACE, batch)
        ga.apply_mask(model, bare, heads=())
    else:
        ga.apply_mask(model, bare, heads=())
        ga.attach(model, SPACE, batch)
    assert trained(model) == set(HEAD)
    leave(model, "adapters")
    assert trained(model) == set()


@pytest.mark.parametrize("first", ["shelf", "delta"])
def test_a_shelf_beside_a_delta(first: str, tmp_path: Path) -> None:
    model, batch = classifier()
    wanted = trained(model)
    ga.attach(model, SPACE, batch).compact()
    ga.get_adapters(model).save(tmp_path / "a")
    ga.detach(model)
    mask = mask_for(model)
    shelf = ga.Shelf.load(model, {"a": tmp_path / "a"}) if first == "shelf" else None
    delta = ga.apply_mask(model, mask)
    shelf = shelf or ga.Shelf.load(model, {"a": tmp_path / "a"})
    assert all(p.requires_grad for p in delta.parameters())
    delta.remove()
    assert trained(model) == set(HEAD)
    delta.reapply(model)
    shelf.detach()
    assert trained(model) == set(HEAD)
    assert all(p.requires_grad for p in delta.parameters())
    delta.remove()
    assert trained(model) == wanted


def test_a_tuned_parameter_trained_in_full_is_an_error_before_the_next_step() -> None:
    model, batch = tiny("llama")
    delta = ga.apply_mask(model, random_mask(model), heads=())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model)
    weight = model.layers[0].mlp.up_proj._parameters["weight"]
    weight.requires_grad_(True)
    loss_of(model, batch).backward()
    with pytest.raises(TrainingError, match=r"in full[\s\S]*layers\.0\.mlp\.up_proj"):
        optimizer.step()
    assert_same_bits(model, before)
    weight.requires_grad_(False)
    delta.remove()


def test_a_module_put_in_the_place_of_a_tuned_one_is_an_error_before_the_next_step() -> None:
    model, batch = tiny("llama", head="lm")
    delta = ga.apply_mask(model, random_mask(model), heads=())
    optimizer = torch.optim.SGD(delta.parameters(), lr=0.1)
    model.set_input_embeddings(nn.Embedding(*model.get_input_embeddings().weight.shape).requires_grad_(False))
    loss_of(model, batch).backward()
    with pytest.raises(TrainingError, match=r"another module[\s\S]*embed_tokens"):
        optimizer.step()


def test_elements_of_a_head_that_adapters_train_in_full_are_refused() -> None:
    model, batch = classifier()
    mask = ga.Mask.build(model, {HEAD[1]: torch.arange(3)})
    wanted = trained(model)
    ga.attach(model, SPACE, batch)
    with pytest.raises(AttachError, match="head of the adapters"):
        ga.apply_mask(model, mask, heads=())
    ga.detach(model)
    delta = ga.apply_mask(model, mask, heads=())
    with pytest.raises(AttachError, match="mask selects elements of a head"):
        ga.attach(model, SPACE, batch)
    delta.remove()
    assert trained(model) == wanted


@pytest.mark.parametrize("name", ["merge", "merge_and_detach"])
def test_adapters_are_not_merged_into_weights_that_a_delta_tunes(name: str) -> None:
    model, batch = tiny("llama", head="lm")
    before = snapshot(model)
    mask = random_mask(model)
    adapters = ga.attach(model, SPACE, batch)
    awaken(adapters.paths)
    adapters.compact()
    delta = ga.apply_mask(model, mask)
    output = model(**batch)[0]
    with pytest.raises(AttachError, match=r"delta tunes elements[\s\S]*delta\.merge\(\) or \.remove\(\) first"):
        getattr(adapters, name)()
    assert torch.equal(model(**batch)[0], output)
    assert adapters.merged is None
    delta.check()
    delta.remove()
    adapters.detach()
    assert_same_bits(model, before)


def test_adapters_are_merged_beside_a_delta_of_other_weights_and_it_stays_off_merged_ones() -> None:
    model, batch = tiny("llama", head="lm")
    before = snapshot(model)
    mask = random_mask(model, names={"model.norm.weight", "model.layers.0.mlp.up_proj.weight"})
    adapters = ga.attach(model, SPACE, batch)
    awaken(adapters.paths)
    adapters.compact()
    delta = ga.apply_mask(model, mask)
    output = model.eval()(**batch)[0]
    adapters.merge()
    torch.testing.assert_close(model(**batch)[0], output, rtol=1e-4, atol=1e-4)
    delta.remove()
    of_merged = random_mask(model, names={"model.layers.0.self_attn.q_proj.weight"})
    with pytest.raises(AttachError, match=r"adapters are merged into[\s\S]*unmerge"):
        ga.apply_mask(model, of_merged)
    adapters.detach()
    assert_same_bits(model, before)
