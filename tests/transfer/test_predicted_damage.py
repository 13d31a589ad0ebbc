"""The predicted damage of an update: what it measures, by hand, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from updates import updated

import gatedadapters as ga
from gatedadapters.errors import AttachError, DataError
from gatedadapters.testing.backbones import VOCABULARY, tiny
from gatedadapters.testing.helpers import awaken

Batch = dict[str, Tensor]


def pair(folder: Path, family: str, paths: list[dict[str, Any]], *, by: float = 0.1) -> tuple[nn.Module, Any, Batch]:
    old, batch = tiny(family)
    new = updated(old, by=by)
    adapters = ga.attach(old, ga.SearchSpace.parse({"paths": paths}, where="test"), batch)
    awaken(adapters)
    adapters.compact()
    adapters.save(folder / "adapter", overwrite=True)
    ga.load_adapters(new, folder / "adapter", base="updated")
    return old, new, batch


def test_damage_of_one_site_is_the_share_of_the_adapter_times_how_far_its_input_moved(tmp_path: Path) -> None:
    at = {"roles": ["down"], "blocks": [1]}
    old, new, batch = pair(tmp_path, "llama", [{"kind": "lora", "rank": 2, "at": at}])
    batch["attention_mask"][0, 5:] = 0
    seen: list[Tensor] = []
    for model in (old, new):
        module = model.layers[1].mlp.down_proj
        handle = module.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
        with torch.no_grad():
            model(**batch)
        handle.remove()
    kept = batch["attention_mask"].bool()
    before, after = (x[kept] for x in seen)
    path = next(iter(ga.get_adapters(old).paths.values()))
    weights = path.down.detach().t() @ path.up.detach().t()
    added = before @ weights
    added_new = after @ weights
    computed = before @ old.layers[1].mlp.down_proj.weight.detach().t()
    found = ga.predict_damage(old, new, [batch])
    (site,) = found.sites
    answers = []
    for model in (old, new):
        with torch.no_grad():
            answers.append(model(**batch).last_hidden_state[kept])
    moved = float((answers[1] - answers[0]).square().sum() / answers[0].square().sum())
    assert found.outputs == pytest.approx(moved, rel=1e-4)
    assert site.module == "layers.1.mlp.down_proj"
    assert site.share == pytest.approx(float(added.norm() / computed.norm()), rel=1e-4)
    assert site.moved == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
    assert site.changed == pytest.approx(float((added_new - added).norm() / added.norm()), rel=1e-4)
    assert found.value == pytest.approx(site.share * site.moved)
    assert "layers.1.mlp.down_proj" in found.table()
    assert found.to_data()["value"] == found.value


EVERY_SIDE: list[dict[str, Any]] = [
    {"kind": "lora", "rank": 2},
    {"kind": "norm"},
    {"kind": "scale", "side": "input", "at": {"roles": ["down"]}},
    {"kind": "parallel", "width": 2, "at": {"sublayers": ["feed_forward"]}},
    {"kind": "serial", "width": 2, "at": {"sublayers": ["attention"]}},
]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_update_that_changed_nothing_damages_nothing_and_a_larger_one_more(tmp_path: Path, family: str) -> None:
    found = []
    for by in (0.0, 0.02, 0.2):
        old, new, batch = pair(tmp_path, family, EVERY_SIDE, by=by)
        before = [{k: v.clone() for k, v in model.state_dict().items()} for model in (old, new)]
        modes = [[module.training for module in model.modules()] for model in (old, new)]
        found.append(ga.predict_damage(old, new, [batch, batch]))
        assert modes == [[module.training for module in model.modules()] for model in (old, new)]
        for model, held in zip((old, new), before, strict=True):
            assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())
            assert not recorders(model)
    nothing, small, large = found
    assert nothing.value == nothing.outputs == 0
    assert large.value == pytest.approx(rms([site.share * site.moved for site in large.sites]))
    assert small.outputs < large.outputs
    assert all(site.changed == 0 for site in nothing.sites)
    assert 0 < small.value < large.value
    kinds = {site.module for site in large.sites if site.share > 0}
    assert len(kinds) > 5


def rms(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).square().mean().sqrt())


def recorders(model: nn.Module) -> list[object]:
    hooks = [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [hook for hook in hooks if type(hook).__module__.endswith("transfer.damage")]


def test_gates_count_as_they_are_at_test_time(tmp_path: Path) -> None:
    old, batch = tiny("llama")
    new = updated(old)
    space = ga.SearchSpace.parse({"paths": [{"kind": "lora", "rank": 2}]}, where="test")
    for model in (old, new):
        adapters = ga.attach(model, space, batch, seed=0)
        awaken(adapters)
        torch.manual_seed(5)
        with torch.no_grad():
            adapters.bank.log_alpha.copy_(2 * torch.randn(adapters.bank.log_alpha.shape))
    twins = copy.deepcopy(old), copy.deepcopy(new)
    for model in twins:
        ga.get_adapters(model).compact()
    gated, compact = ga.predict_damage(old, new, [batch]), ga.predict_damage(*twins, [batch])
    kept = {site.module: site for site in gated.sites if site.share > 0}
    assert kept.keys() == {site.module for site in compact.sites}
    assert all(site.share == pytest.approx(kept[site.module].share, rel=1e-3) for site in compact.sites)


def test_without_the_same_adapters_on_both_bases_nothing_is_predicted(tmp_path: Path) -> None:
    old, new, batch = pair(tmp_path, "bert", [{"kind": "lora", "rank": 2}])
    ga.detach(new)
    with pytest.raises(AttachError, match="the new model has no adapters"):
        ga.predict_damage(old, new, [batch])
    ga.attach(new, ga.SearchSpace.parse({"paths": [{"kind": "norm"}]}, where="test"), batch)
    with pytest.raises(AttachError, match="do not have the same adapters"):
        ga.predict_damage(old, new, [batch])
    ga.detach(new)
    ga.load_adapters(new, tmp_path / "adapter", base="updated")
    ga.predict_damage(old, new, [batch])
    ga.detach(old)
    with pytest.raises(AttachError, match="the old model has no adapters"):
        ga.predict_damage(old, new, [batch])


def test_text_of_another_tokenizer_and_no_text_are_refused(tmp_path: Path) -> None:
    old, new, batch = pair(tmp_path, "bert", [{"kind": "lora", "rank": 2}])
    with pytest.raises(DataError, match="at least one batch"):
        ga.predict_damage(old, new, [])
    batch["input_ids"][0, 0] = VOCABULARY
    with pytest.raises(DataError, match=f"0..{VOCABULARY - 1}"):
        ga.predict_damage(old, new, [batch])
