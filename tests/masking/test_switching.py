"""A delta that is in no model, one after the other in a classifier, and of scalars."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from masked_recipes import assert_same_bits, loss_of, masked, random_mask, snapshot, train
from torch import Tensor, nn

import gatedadapters as ga
from gatedadapters.errors import AttachError, MaskError
from gatedadapters.testing import tiny


@pytest.mark.parametrize("end", ["remove", "merge"])
def test_a_delta_that_has_left_says_so(end: str, tmp_path: Path) -> None:
    _, _, delta = masked("llama")
    getattr(delta, end)()

    def disabled() -> None:
        with delta.disabled():
            pass

    for call in (delta.merge, delta.remove, delta.write, delta.check, disabled):
        with pytest.raises(AttachError, match="in no model"):
            call()
    delta.save(tmp_path / "kept")
    assert ga.load_delta(tiny("llama")[0], tmp_path / "kept").mask == delta.mask


def test_a_delta_goes_back_with_the_heads_it_had() -> None:
    model, batch = tiny("bert", head="classification")
    mask = ga.Mask.build(model, {"bert.pooler.dense.bias": torch.arange(3)})
    delta = ga.apply_mask(model, mask, heads=())
    delta.remove()
    assert delta.reapply(model).head_names == ()
    loss_of(model, batch).backward()


def test_switching_on_a_classifier_brings_each_ones_head_and_each_can_be_saved_meanwhile(tmp_path: Path) -> None:
    model, batch = tiny("bert", head="classification")
    base = snapshot(model)
    backbone = random_mask(model, names={n for n in base if n.startswith("bert.")})
    mask = ga.Mask.build(
        model,
        {n: backbone.dense(n) for n in backbone.names},
        heads=frozenset({"classifier.weight", "classifier.bias"}),
    )
    states, deltas = [], []
    for lr in (1e-2, 3e-2):
        delta = ga.apply_mask(model, mask)
        train(model, delta, batch, torch.optim.AdamW(model.parameters(), lr=lr))
        states.append(snapshot(model))
        deltas.append(delta)
        delta.remove()
    assert not torch.equal(states[0]["classifier.weight"], states[1]["classifier.weight"])
    for index in (0, 1, 0):
        deltas[index].save(tmp_path / f"{index}", overwrite=True)
        deltas[index].reapply(model)
        assert_same_bits(model, states[index])
        deltas[index].remove()
        with torch.no_grad():
            model.classifier.weight.add_(1.0)  # the model's head moves on, the delta's own copy does not
        fresh, _ = tiny("bert", head="classification")
        ga.load_delta(fresh, tmp_path / f"{index}")
        assert_same_bits(fresh, states[index])
    other, _ = tiny("bert", head="classification")
    other.classifier = nn.Linear(other.classifier.in_features, 7)
    before = snapshot(other)
    with pytest.raises(MaskError, match="differ in shape"):
        deltas[0].reapply(other)
    assert_same_bits(other, before)


def test_a_scalar_is_tuned_and_comes_back() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.logit_scale = nn.Linear(4, 4), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.linear(x) * self.logit_scale.exp(),)

    torch.manual_seed(0)
    model, batch = Scaled(), {"x": torch.randn(3, 4)}
    before = snapshot(model)
    loss_of(model, batch).backward()
    wanted = model.logit_scale.grad.clone()
    chosen = {"logit_scale": torch.tensor(True), "linear.weight": torch.tensor([1, 5])}
    delta = ga.apply_mask(model, ga.Mask.build(model, chosen), heads=())
    assert delta.params == 3
    loss_of(model, batch).backward()
    (scale,) = [part for name, part in delta.items() if name == "logit_scale"]
    assert scale.values.grad.item() == pytest.approx(wanted.item())
    train(model, delta, batch)
    assert float(model._parameters["logit_scale"]) == scale.values.item() != 2.0
    delta.remove()
    assert_same_bits(model, before)
