"""What `elements` do beyond the contract."""

from __future__ import annotations

import copy
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from torch import nn

import gatedadapters as ga
from gatedadapters.backbone import discover
from gatedadapters.errors import ConfigError, PathError
from gatedadapters.paths import Elements, Point, Site, SkippedSite
from gatedadapters.paths.elements import ElementsOptions, largest
from gatedadapters.testing import tiny
from gatedadapters.testing.helpers import awaken, output_of, random_loss

OPEN = {"stochastic": False, "init": 4.0, "init_spread": 0.0}


def space(**options: Any) -> ga.SearchSpace:
    return ga.SearchSpace(gates=OPEN, paths=(ElementsOptions(**options),))


def stored(path: Elements, model: nn.Module) -> tuple[str, torch.Tensor]:
    """The name of the weight, and the positions in the flattened tensor as it is stored."""
    site, positions = path.site, path.positions
    rows, columns = positions // site.width_in, positions % site.width_in
    return f"{site.write.module}.weight", columns * site.width_out + rows if site.transposed else positions


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_gradients_are_those_of_the_elements_of_the_weights(family: str) -> None:
    """Outside oracle: autograd of the backbone's own weights, stored either way."""
    model, batch = tiny(family)
    random_loss(model, batch).backward()
    own = {name: p.grad.clone().flatten() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    adapters = ga.attach(model, space(), batch)
    random_loss(model, batch).backward()
    for path in adapters.paths.values():
        name, positions = stored(path, model)
        torch.testing.assert_close(path.values.grad, own[name][positions], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_without_data_they_are_the_largest_weights_and_the_largest_come_first(family: str) -> None:
    model, batch = tiny(family)
    weights = {name: p.detach().clone().flatten().abs() for name, p in model.named_parameters()}
    adapters = ga.attach(model, space(k=12, chunk=4), batch)
    for path in adapters.paths.values():
        name, positions = stored(path, model)
        chosen = weights[name][positions].view(3, 4)
        assert torch.equal(chosen.flatten().sort().values, weights[name].topk(12).values.sort().values)
        assert chosen[0].min() >= chosen[1].max() >= chosen[1].min() >= chosen[2].max()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_choose_the_elements_and_the_choice_is_kept_in_structure_file_and_checkpoint(
    family: str, tmp_path: FilePath
) -> None:
    model, batch = tiny(family)
    scores = ga.score(model, [batch], kind="mas")
    adapters = ga.attach(model, space(k=8, chunk=4), batch)
    adapters.choose_elements(scores)
    for path in adapters.paths.values():
        name, positions = stored(path, model)
        assert set(positions.tolist()) == set(scores[name].flatten().topk(8).indices.tolist())
    awaken(adapters)
    expected, state = output_of(model, batch), copy.deepcopy(model.state_dict())

    resumed, _ = tiny(family)
    again = ga.attach(resumed, space(k=8, chunk=4), batch)
    resumed.load_state_dict(state)
    assert torch.equal(output_of(resumed, batch), expected)
    assert again.discretize() == adapters.discretize()

    adapters.compact()
    adapters.save(tmp_path / "saved", dtype=torch.bfloat16)
    fresh, _ = tiny(family)
    loaded = ga.load_adapters(fresh, tmp_path / "saved")
    torch.testing.assert_close(output_of(fresh, batch), expected, rtol=0.02, atol=0.02)
    assert all(torch.equal(loaded.paths[key].positions, path.positions) for key, path in adapters.paths.items())


def test_a_merge_changes_the_elements_and_nothing_else() -> None:
    model, batch = tiny("gpt2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapters = ga.attach(model, space(k=16), batch)
    awaken(adapters)
    expected = output_of(model, batch)
    adapters.compact()
    adapters.merge()
    torch.testing.assert_close(output_of(model, batch), expected, rtol=1e-4, atol=1e-5)
    for path in adapters.paths.values():
        name, positions = stored(path, model)
        changed = (before[name] != model.get_parameter(name)).flatten().nonzero().flatten()
        assert torch.equal(changed, positions.sort().values)


def site(width_in: int = 6, width_out: int = 4) -> Site:
    return Site(Point("m", "input"), Point("m", "output"), width_in, width_out, "b", 0, "feed_forward", "up")


@pytest.mark.parametrize(
    ("positions", "got"), [([0, 1, 2, 24], "0..24"), ([0, 1, 1, 3], "one twice"), ([0, 1, 2], "3 positions")]
)
def test_positions_that_do_not_fit_are_refused_by_name_and_change_nothing(positions: list[int], got: str) -> None:
    path = Elements(site(), ElementsOptions(k=4, chunk=2))
    before = path.positions.clone()
    with pytest.raises(PathError, match=f"(?s){got}.*elements at m"):
        path.choose(torch.tensor(positions))
    assert torch.equal(path.positions, before)


@pytest.mark.parametrize("options", [{"k": 10, "chunk": 4}, {"k": 2, "chunk": 2, "gaps": ((3, 0),)}, {"k": 0}])
def test_options_that_do_not_fit_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ElementsOptions(**options)


def test_a_structure_of_another_weight_is_refused() -> None:
    with pytest.raises(PathError, match=r"0\.\.30"):
        Elements(site(), ElementsOptions(k=2, chunk=2, gaps=((0, 30),)))


def test_maps_with_fewer_weights_are_skipped_by_name_and_with_no_map_left_nothing_is_attached() -> None:
    model, batch = tiny("bert")
    sites = list(Elements.sites(ElementsOptions(k=1040), discover(model, batch)))
    assert {s.module.rpartition(".")[2] for s in sites if isinstance(s, SkippedSite)} >= {"query", "key", "value"}
    assert any(isinstance(s, Site) for s in sites)  # 32 x 64
    with pytest.raises(PathError, match="fewer than 16000 elements"):
        ga.attach(model, space(k=16000), batch)
    assert not hasattr(model, "gated_adapters")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", ["all differ", "many are equal", "all are equal", "one row has them all"])
@pytest.mark.parametrize(("shape", "k"), [((40, 7), 5), ((7, 40), 5), ((6, 50), 300), ((1, 9), 4), ((30, 1), 8)])
def test_the_largest_are_those_of_a_whole_sort_and_of_equals_the_earlier_one(
    shape: tuple[int, int], k: int, values: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    if values == "many are equal":
        matrix = matrix.round()
    elif values == "all are equal":
        matrix.fill_(-1.5)
    elif values == "one row has them all":
        matrix[shape[0] // 2] += 10.0
    matrix = matrix.to(dtype)
    for stored in (matrix, matrix.t().contiguous().t()):  # as Linear and Conv1D hold it
        assert torch.equal(largest(stored, k), matrix.flatten().sort(descending=True, stable=True).indices[:k])


@pytest.mark.parametrize("spoil", ["missing", "shape", "nan", "inf", "-inf"])
def test_scores_that_do_not_fit_name_the_weight(spoil: str) -> None:
    model, batch = tiny("bert")
    adapters = ga.attach(model, space(), batch)
    scores = {name: p.detach().abs() for name, p in model.named_parameters()}
    name = "encoder.layer.1.output.dense.weight"
    if spoil == "missing":
        del scores[name]
    else:
        scores[name] = scores[name].t() if spoil == "shape" else scores[name].clone()
        if spoil != "shape":
            scores[name][3, 5] = float(spoil)
    with pytest.raises(PathError, match=r"encoder\.layer\.1\.output\.dense"):
        adapters.choose_elements(scores)


def test_without_elements_there_is_nothing_to_choose() -> None:
    model, batch = tiny("bert")
    with pytest.raises(PathError, match="kind elements"):
        ga.attach(model, "attention-only", batch).choose_elements({})


def test_random_elements_are_distinct_and_every_unit_reaches_all_over_the_weight() -> None:
    path = Elements(site(64, 48), ElementsOptions(k=64, score="random"), torch.Generator().manual_seed(0))
    assert len(path.positions.unique()) == 64
    spread = path.positions.view(4, 16)
    assert (spread[:, -1] - spread[:, 0]).min() > 64 * 48 / 2


def test_a_narrowed_path_computes_its_open_units_alone() -> None:
    model, batch = tiny("llama")
    adapters = ga.attach(model, space(k=16, chunk=4), batch)
    path = next(iter(adapters.paths.values()))
    with torch.no_grad():
        path.values.normal_()
    gate = torch.tensor([1.0, 0.0, 0.0, 0.0])
    tapped, target = torch.randn(5, path.site.width_in), torch.randn(5, path.site.width_out)

    def results() -> list[torch.Tensor]:
        path.values.grad = None
        given = tapped.clone().requires_grad_()
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            found = path(given, target, gate)
        counts.append(sum(kept))
        found.square().sum().backward()
        return [found.detach(), given.grad, path.values.grad]

    counts: list[int] = []
    whole = results()
    with path.narrowed(1):
        narrow = results()
    for a, b in zip(whole, narrow, strict=True):
        torch.testing.assert_close(a, b)
    assert counts[1] < counts[0]
    results()
    assert counts[2] == counts[0]
