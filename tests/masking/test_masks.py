"""Which elements a mask selects, against sorting everything; set algebra, bytes, files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

import gatedadapters as ga
from gatedadapters.errors import ArtifactError, MaskError
from gatedadapters.masking import selection
from gatedadapters.masking.encoding import decode, encode
from gatedadapters.masking.selection import lowest, normalised_ranks
from gatedadapters.testing import tiny


def random_scores(seed: int, **options: Any) -> ga.Scores:
    model, _ = tiny("bert")
    return ga.score(model, kind="random", seed=seed, **options)


# -- selection ---------------------------------------------------------------------------------------------------------


def test_ranks_are_averaged_over_ties() -> None:
    values = torch.tensor([[3.0, 0.0, 0.0], [1.0, 3.0, 2.0]])
    wanted = rankdata(values.numpy().ravel(), method="average") / 6
    assert normalised_ranks(values).flatten().tolist() == pytest.approx(wanted)
    assert normalised_ranks(torch.zeros(5)).tolist() == pytest.approx([0.6] * 5)


def test_ranks_differ_where_values_do_in_a_tensor_of_any_size() -> None:
    values = torch.arange(2**24 + 2**16, dtype=torch.int32).view(torch.float32)  # as many distinct numbers, in order
    assert bool((normalised_ranks(values).diff() > 0).all())


def test_float64_keys_are_told_apart_to_the_last_bit() -> None:
    values = 1.0 + torch.arange(-300, 300, dtype=torch.float64) * 2.0**-52
    keys = {"a": values.flip(0), "b": -values, "c": torch.tensor([torch.inf, -torch.inf, 0.0, -0.0]).double()}
    everything = torch.cat(list(keys.values()))
    for count in (1, 2, 300, 601, 602, 603, 700, 1204):
        wanted = np.sort(np.argsort(everything.numpy(), kind="stable")[:count])
        found = lowest(keys, count)
        got = torch.cat([found["a"], found["b"] + 600, found["c"] + 1200])
        assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("in_memory", [2**31, 0])
def test_equal_differences_of_ranks_are_equal_keys(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "IN_MEMORY_BYTES", in_memory)
    general = random_scores(0)
    up, down = copy.copy(general), copy.copy(general)
    for scores, step in ((up, 1), (down, 0)):
        scores._values = {
            n: torch.arange(v.numel()).roll(step).float().view(v.shape) for n, v in general._values.items()
        }
    # each rank in `up` is one less than in `down`, but for the first element, which is last in `up`
    mask = ga.select(up, down, density=0.25, scope="tensor")
    assert any(general[name].numel() % 64 for name in general.names)  # numbers by which division is not exact
    for name in general.names:
        found = mask.dense(name).flatten().nonzero().flatten()
        assert found.tolist() == list(range(1, 1 + round(0.25 * general[name].numel())))


@pytest.mark.parametrize("count", [0, 1, 7, 500, 1499, 1500])
@pytest.mark.parametrize("ties", [False, True])
def test_streamed_selection_equals_a_sort_of_everything(count: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = {name: torch.randn(500, generator=generator) * 10 ** (3 * i - 4) for i, name in enumerate("abc")}
    if ties:
        keys = {name: (value * 0.5).round().clamp(-2, 2) for name, value in keys.items()}
    found = lowest(keys, count)
    everything = np.concatenate([key.numpy() for key in keys.values()]) + 0.0
    wanted = np.sort(np.argsort(everything, kind="stable")[:count])
    got = np.concatenate([found[name].numpy() + 500 * i for i, name in enumerate("abc")])
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("contrast", [0.0, 1.0])
def test_what_matters_in_general_stays_and_what_matters_to_the_domain_is_free(contrast: float) -> None:
    general, domain = random_scores(0), random_scores(1)
    mask = ga.select(general, domain, protect=0.9, contrast=contrast)
    assert mask.count() == round(0.1 * mask.size)
    ranks = [{n: rankdata(s[n].numpy().ravel()) / s[n].numel() for n in s.names} for s in (general, domain)]
    combined = np.concatenate([ranks[0][n] - contrast * ranks[1][n] for n in general.names])
    free = np.concatenate([mask.dense(n).numpy().ravel() for n in general.names])
    assert combined[free].max() <= combined[~free].min() + 1e-6
    assert mask.origin["contrast"] == contrast


def test_without_a_domain_the_least_important_elements_are_free() -> None:
    general = random_scores(0)
    assert ga.select(general, density=0.1) == ga.select(general, random_scores(1), protect=0.9, contrast=0.0)


def test_scope_tensor_takes_the_same_share_of_each() -> None:
    mask = ga.select(random_scores(0), random_scores(1), density=0.25, scope="tensor")
    assert all(mask.count(n) == round(0.25 * int(np.prod(mask.shape(n)))) for n in mask.names)


def test_roles_and_names_include_and_exclude() -> None:
    general = random_scores(0)
    roles = general.roles
    assert {"q", "k", "v", "o", "up", "down", "bias", "norm", "embedding"} <= set(roles.values())
    mask = ga.select(general, protect=0.5, include=["q", "bert.*.up.*" if False else "up"], exclude=["*.0.*"])
    assert mask.names
    assert all(roles[n] in ("q", "up") and ".0." not in n for n in mask.names)
    for wrong in ({"include": ["elephants"]}, {"exclude": ["*"]}):
        with pytest.raises(MaskError):
            ga.select(general, **wrong)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_shares_outside_the_open_interval_are_refused(share: float) -> None:
    for name in ("protect", "density"):
        with pytest.raises(MaskError, match="in \\(0, 1\\)"):
            ga.select(random_scores(0), **{name: share})


def test_the_old_name_of_protect_still_works_and_says_the_new_one() -> None:
    general = random_scores(0)
    with pytest.warns(DeprecationWarning, match="protect") as seen:
        assert ga.select(general, core=0.7) == ga.select(general, protect=0.7)
    assert seen[0].filename == __file__  # the warning points at the caller's line
    with pytest.raises(MaskError, match=r"(?s)core=, its old name.*drop core"):
        ga.select(general, core=0.7, protect=0.7)


def test_scores_that_say_nothing_or_belong_elsewhere_are_refused() -> None:
    general = random_scores(0)
    zeros = ga.Scores(general.record, {n: torch.zeros_like(general[n]) for n in general.names})
    with pytest.raises(MaskError, match="all scores are 0"):
        ga.select(general, zeros)
    with pytest.raises(MaskError, match="another backbone"):
        ga.select(general, ga.score(tiny("bert", seed=1)[0], kind="random"))
    with pytest.raises(MaskError, match="different parameters"):
        ga.select(general, random_scores(1, include=["q"]))
    with pytest.raises(MaskError, match="select nothing"):
        ga.select(general, density=1e-9)


# -- encoding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [1e-4, 0.002, 0.01, 0.02, 0.1, 0.3, 1.0])
def test_positions_survive_encoding(density: float) -> None:
    size = 200_003
    chosen = torch.rand(size, generator=torch.Generator().manual_seed(1)) < density
    positions = chosen.nonzero().flatten()
    coding, data = encode(positions, size)
    assert data.dtype == torch.uint8
    assert torch.equal(decode(coding, data, size), positions)
    assert len(data) <= -(-size // 8)
    if density == 0.02:
        assert len(data) <= 1.1 * len(positions)


@pytest.mark.parametrize(
    "positions", [[], [0], [254], [255], [256], [0, 255, 510, 1021], [65534, 65535, 65536, 131072], [199_999]]
)
def test_gaps_at_the_edges_of_a_byte_survive(positions: list[int]) -> None:
    wanted = torch.tensor(positions, dtype=torch.int64)
    coding, data = encode(wanted, 200_000)
    assert torch.equal(decode(coding, data, 200_000), wanted)


@pytest.mark.parametrize(
    ("coding", "data"),
    [("gaps8", [255]), ("gaps8", [99, 1]), ("gaps16", [1]), ("bits", [1, 2, 3]), ("bits", [255] * 13), ("zip", [1])],
)
def test_damaged_positions_are_refused(coding: str, data: list[int]) -> None:
    with pytest.raises(ArtifactError, match="do not decode"):
        decode(coding, torch.tensor(data, dtype=torch.uint8), 100)


# -- algebra and files -------------------------------------------------------------------------------------------------


def pair() -> tuple[ga.Mask, ga.Mask, dict[str, tuple[np.ndarray, np.ndarray]]]:
    one = ga.select(random_scores(0), protect=0.7)
    two = ga.select(random_scores(1), protect=0.6, exclude=["embedding"])
    names = dict.fromkeys([*one.names, *two.names])
    dense = {}
    for name in names:
        shape = one.shape(name)
        dense[name] = tuple(m.dense(name).numpy() if name in m.names else np.zeros(shape, bool) for m in (one, two))
    return one, two, dense


def test_set_algebra_is_that_of_sets() -> None:
    one, two, dense = pair()
    for name, (a, b) in dense.items():
        assert np.array_equal((one | two).dense(name).numpy(), a | b)
        assert np.array_equal((one & two).dense(name).numpy(), a & b)
        assert np.array_equal((one - two).dense(name).numpy(), a & ~b)
        assert np.array_equal((~one).dense(name).numpy(), ~a)
    assert ~~one == one
    assert (one - one).count() == 0
    assert one != two


def test_overlap_counts_what_is_shared_and_what_chance_would_share() -> None:
    one, two, dense = pair()
    total = one.overlap(two).rows[0]
    both = sum(int((a & b).sum()) for a, b in dense.values())
    either = sum(int((a | b).sum()) for a, b in dense.values())
    assert (total.first, total.second, total.both) == (one.count(), two.count(), both)
    assert total.jaccard == pytest.approx(both / either)
    assert total.chance == pytest.approx(one.count() * two.count() / one.size)
    assert "embedding" in str(one.overlap(two))
    assert one.overlap(one).jaccard == 1.0


def test_masks_of_different_backbones_do_not_mix() -> None:
    one = ga.select(random_scores(0))
    other = ga.select(ga.score(tiny("gpt2")[0], kind="random"))
    for mix in (lambda: one | other, lambda: one.overlap(other)):
        with pytest.raises(MaskError, match="another backbone"):
            mix()


def test_a_saved_mask_comes_back(tmp_path: Path) -> None:
    mask = ga.select(random_scores(0), random_scores(1), density=0.02)
    mask.save(tmp_path / "mask")
    again = ga.Mask.load(tmp_path / "mask")
    assert again == mask
    assert again.origin == mask.origin
    assert str(again) == str(mask)
    assert "embedding" in str(mask)
    with pytest.raises(ArtifactError, match="already holds"):
        mask.save(tmp_path / "mask")
    mask.save(tmp_path / "mask", overwrite=True)


def test_damaged_or_foreign_mask_files_are_refused(tmp_path: Path) -> None:
    mask = ga.select(random_scores(0))
    for number, damage in enumerate(
        [
            lambda f: (f / "mask.json").unlink(),
            lambda f: (f / "mask.json").write_text("{"),
            lambda f: (f / "mask.json").write_text('{"version": 2}'),
            lambda f: (f / "mask.json").write_text((f / "mask.json").read_text().replace('"count": ', '"count": 1', 1)),
            lambda f: (f / "mask.json").write_text((f / "mask.json").read_text().replace('"coding"', '"code"', 1)),
            lambda f: (f / "mask.safetensors").unlink(),
            lambda f: (f / "mask.safetensors").write_bytes((f / "mask.safetensors").read_bytes()[:-1]),
            lambda f: (f / "mask.safetensors").write_bytes(b"\x80\x04pickled"),
        ]
    ):
        folder = tmp_path / str(number)
        mask.save(folder)
        damage(folder)
        with pytest.raises(ArtifactError):
            ga.Mask.load(folder)


def test_a_mask_of_ones_own_choice() -> None:
    model, _ = tiny("bert")
    name, weight = next(iter(model.named_parameters()))
    chosen = torch.zeros(weight.shape, dtype=torch.bool)
    chosen.view(-1)[[3, 8]] = True
    assert ga.Mask.build(model, {name: chosen}) == ga.Mask.build(model, {name: torch.tensor([8, 3])})
    for wrong in (
        {"elephant": chosen},
        {name: chosen[:1]},
        {name: torch.tensor([3, 3])},
        {name: torch.tensor([-1])},
        {name: torch.tensor([weight.numel()])},
        {name: torch.tensor([0.5])},
    ):
        with pytest.raises(MaskError):
            ga.Mask.build(model, wrong)
