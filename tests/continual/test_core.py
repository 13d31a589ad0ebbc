"""Selections against numbers computed in another way."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.spatial.distance import cosine as cosine_distance

from gatedadapters.backbone.fingerprint import Fingerprint
from gatedadapters.config import ProbeConfig
from gatedadapters.continual import Probe, TensorInfo, carry_core, random_core, select_core
from gatedadapters.continual.core import Core, load_core, save_core, share_of_tensors
from gatedadapters.continual.probing import ProbeRecord
from gatedadapters.errors import MaskError
from gatedadapters.masking import Scores
from gatedadapters.masking.scores.storage import ScoresRecord, sharded

IDENTITY = Fingerprint(model_class="Made", shapes="s", values="v", heads=())
SHAPES = {"emb": (50, 4), "l.0.w": (8, 8), "l.0.n": (8,), "l.1.w": (8, 8), "l.1.n": (8,), "dead": (6,)}


def infos(blocks: int = 2) -> dict[str, TensorInfo]:
    found = {"emb": TensorInfo((50, 4), "embedding", None, "emb", blocks)}
    for block in range(blocks):
        found[f"l.{block}.w"] = TensorInfo((8, 8), "up", block, "l.*.w", blocks)
        found[f"l.{block}.n"] = TensorInfo((8,), "norm", block, "l.*.n", blocks)
    return found | {"dead": TensorInfo((6,), "bias", None, "dead", blocks)}


@pytest.fixture
def probes(tmp_path: Path) -> list[Probe]:
    """Three tasks' updates of a made-up model, and squared gradients; `dead` moves under none."""
    return made(tmp_path)


def made(tmp_path: Path, *, moved: float = 1.0) -> list[Probe]:
    """The same, where only a share of the elements has moved."""
    found = []
    for task in range(3):
        generator = torch.Generator().manual_seed(task)
        deltas = {name: torch.randn(shape, generator=generator) / 10 for name, shape in SHAPES.items()}
        for delta in deltas.values():
            delta.view(-1)[round(moved * delta.numel()) :] = 0
        deltas["dead"].zero_()
        squares = {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
        folder = tmp_path / str(task)
        folder.mkdir()
        save_file(deltas, folder / "deltas.safetensors")
        Scores(ScoresRecord(kind="batch_fisher", fingerprint=IDENTITY, tensors=sharded(SHAPES, {})), squares).save(
            folder / "fisher"
        )
        record = ProbeRecord(
            task=str(task),
            start="",
            seed=0,
            config=ProbeConfig(),
            steps=1,
            examples=1,
            seconds=0.0,
            norms={name: float(d.double().norm()) for name, d in deltas.items()},
            fisher={name: float(s.double().mean()) for name, s in squares.items()},
        )
        (folder / "probe.json").write_text(record.model_dump_json())
        found.append(Probe.load(folder))
    return found


def scaled(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min())


def test_l2_fisher_ranks_tensors_as_the_released_formula_does(probes: list[Probe]) -> None:
    names = list(SHAPES)
    d = np.array([np.sqrt(np.mean(probes[1].delta(n).double().numpy() ** 2)) for n in names])
    F = np.array([probes[1].squared_gradients()[n].double().mean().item() for n in names])
    S = 0.5 * scaled(d) + 0.5 * scaled(F)
    for share, count in ((0.1, 1), (0.34, 2), (0.5, 3)):
        core = select_core(infos(), probes, 1, share=share)
        assert set(core.indices) == {names[i] for i in np.argsort(-S)[:count]}
        assert all(len(core.indices[name]) == math.prod(SHAPES[name]) for name in core.indices)
    assert [core.scores[n] for n in names] == pytest.approx(S.tolist())


def test_cosine_takes_the_tensors_least_like_other_tasks_and_no_unmoved_one(probes: list[Probe]) -> None:
    alive = [name for name in SHAPES if name != "dead"]
    flat = [{n: p.delta(n).double().flatten().numpy() for n in alive} for p in probes]
    spec = {n: np.mean([1 - cosine_distance(flat[0][n], flat[u][n]) for u in (1, 2)]) for n in alive}
    core = select_core(infos(), probes, 0, kind="cosine", share=0.34)
    assert set(core.indices) == set(sorted(alive, key=spec.__getitem__)[:2])
    assert {n: -core.scores[n] for n in alive} == pytest.approx(spec)
    everything = select_core(infos(), probes, 0, kind="cosine", share=0.84)
    assert "dead" not in everything.indices


@pytest.mark.parametrize("kind", ["l2_fisher", "cosine", "delta"])
def test_elements_are_the_exact_global_top(kind: str, probes: list[Probe]) -> None:
    names = [n for n in SHAPES if n != "dead"] if kind == "cosine" else list(SHAPES)

    def joined(values: dict[str, torch.Tensor]) -> np.ndarray:
        return np.concatenate([values[n].double().flatten().numpy() for n in names])

    deltas = [{n: p.delta(n) for n in names} for p in probes]
    own = joined(deltas[2])
    if kind == "delta":
        S = np.abs(own)
    elif kind == "l2_fisher":
        F = joined({n: probes[2].squared_gradients()[n] for n in names})
        S = 0.5 * scaled(np.abs(own)) + 0.5 * scaled(F)
    else:
        parts = [
            np.mean(
                [
                    deltas[2][n].double()
                    * deltas[u][n].double()
                    * deltas[2][n].numel()
                    / (deltas[2][n].double().norm() * deltas[u][n].double().norm())
                    for u in (0, 1)
                ],
                axis=0,
            ).ravel()
            for n in names
        ]
        S = -np.concatenate(parts)
    total = sum(math.prod(shape) for shape in SHAPES.values())
    count = round(0.1 * total)
    core = select_core(infos(), probes, 2, kind=kind, share=0.1, granularity="element")  # type: ignore[arg-type]
    chosen = {n: np.zeros(math.prod(SHAPES[n]), bool) for n in names}
    for name, found in core.indices.items():
        chosen[name][found.numpy()] = True
    mask = np.concatenate([chosen[n] for n in names])
    assert core.elements == mask.sum() == count
    assert S[mask].min() >= S[~mask].max() - 1e-6


def test_contributions_of_elements_average_to_their_tensors_cosine(probes: list[Probe]) -> None:
    from gatedadapters.continual.core import _contributions

    whole = -select_core(infos(), probes, 0, kind="cosine").scores["l.0.w"]
    assert float(_contributions(probes, 0, "l.0.w").double().mean()) == pytest.approx(whole, abs=1e-7)


@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_what_earlier_tasks_chose_is_excluded(granularity: str, probes: list[Probe]) -> None:
    earlier: list[Core] = []
    for task in range(3):
        core = select_core(infos(), probes, task, share=0.3, granularity=granularity, previous=earlier)  # type: ignore[arg-type]
        assert all(core.overlap(other) == 0 for other in earlier)
        earlier.append(core)
    alone = select_core(infos(), probes, 2, share=0.3, granularity=granularity)  # type: ignore[arg-type]
    assert alone.overlap(alone) == 1
    everything = [Core({n: torch.arange(i.numel) for n, i in infos().items()}, infos(), "all")]
    with pytest.raises(MaskError, match="nothing is left"):
        select_core(infos(), probes, 0, granularity=granularity, previous=everything)  # type: ignore[arg-type]


def test_elements_that_never_moved_do_not_make_room_for_those_of_earlier_tasks(tmp_path: Path) -> None:
    probes, earlier = made(tmp_path, moved=0.2), []
    for task in range(3):
        core = select_core(infos(), probes, task, kind="cosine", share=0.15, granularity="element", previous=earlier)
        assert all(core.overlap(other) == 0 for other in earlier)
        assert core.elements == round(0.15 * sum(info.numel for info in infos().values()))
        earlier.append(core)


def test_cosine_of_one_task_is_refused(probes: list[Probe]) -> None:
    with pytest.raises(MaskError, match="compares the updates"):
        select_core(infos(), probes[:1], 0, kind="cosine")


@pytest.mark.parametrize("granularity", ["tensor", "element"])
@pytest.mark.parametrize("count", [1, 8, 70, 207, 350])
def test_random_cores_have_exactly_the_number_asked_for(granularity: str, count: int) -> None:
    seen = set()
    for seed in range(4):
        core = random_core(infos(), count, granularity=granularity, seed=seed)  # type: ignore[arg-type]
        assert core.elements == count
        assert all(bool((found.diff() > 0).all()) for found in core.indices.values())
        seen.add(str({n: f.tolist() for n, f in core.indices.items()}))
        if granularity == "tensor":
            partial = [n for n, found in core.indices.items() if len(found) < infos()[n].numel]
            assert len(partial) <= 1
    assert len(seen) > 1 or count == 350
    with pytest.raises(MaskError, match="so many"):
        random_core(infos(), 351, granularity=granularity, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_shares_are_of_the_whole_backbone_also_where_few_tensors_may_be_chosen(
    granularity: str, probes: list[Probe]
) -> None:
    few = ("l.0.w", "l.1.w", "l.0.n")
    chosen = select_core(infos(), probes, 0, share=0.5, granularity=granularity, candidates=few)  # type: ignore[arg-type]
    drawn = random_core(infos(), chosen.elements, granularity=granularity, seed=0, candidates=few)  # type: ignore[arg-type]
    for core in (chosen, drawn):
        assert core.indices.keys() <= set(few)
        assert core.infos == infos()
        assert core.element_share == core.elements / 350
        assert core.tensor_share == len(core.indices) / 6
    assert chosen.elements == (round(0.5 * 136) if granularity == "element" else sum(map(len, chosen.indices.values())))


@pytest.mark.parametrize(
    ("share", "count", "tensors"),
    [(0.1, 579, 57), (0.1, 707, 70), (0.15, 291, 43), (0.1, 10, 1), (0.7, 10, 7), (0.29, 100, 29), (0.1, 3, 1)],
)
def test_a_share_of_tensors_is_rounded_down_as_released(share: float, count: int, tensors: int) -> None:
    assert share_of_tensors(share, count) == tensors


def test_a_share_of_less_than_an_element_is_one_element(probes: list[Probe]) -> None:
    assert select_core(infos(), probes, 0, share=1e-6, granularity="element").elements == 1


def test_exclusive_random_tensors_use_what_earlier_ones_left_of_a_tensor() -> None:
    for seed in range(5):
        earlier: list[Core] = []
        for task in range(3):
            core = random_core(infos(), 116, seed=10 * seed + task, previous=earlier)
            assert core.elements == 116
            assert all(core.overlap(other) == 0 for other in earlier)
            assert all(bool((found.diff() > 0).all()) for found in core.indices.values())
            earlier.append(core)
        with pytest.raises(MaskError, match="so many"):
            random_core(infos(), 3, seed=seed, previous=earlier)  # 2 of 350 are left


def test_cells_count_tensors_and_elements_by_block_and_role() -> None:
    core = Core({"emb": torch.arange(10), "l.1.n": torch.arange(8)}, infos(), "made")
    assert core.cells()[None, "embedding"] == (1, 1, 10, 200)
    assert core.cells()[1, "norm"] == (1, 1, 8, 8)
    assert core.cells()[0, "norm"] == (0, 1, 0, 8)
    assert core.tensor_share == pytest.approx(2 / 6)
    assert core.element_share == pytest.approx(18 / 350)
    assert "2 of 6 tensors (33.3%), 18 elements (5.143%)" in core.table()


def test_a_core_is_stored_and_read(tmp_path: Path, probes: list[Probe]) -> None:
    core = select_core(infos(), probes, 1, share=0.3)
    save_core(core, tmp_path, IDENTITY)
    found = load_core(tmp_path)
    assert found.infos == core.infos
    assert found.scores == core.scores
    assert found.overlap(core) == 1


def test_a_core_is_carried_by_role_and_relative_depth() -> None:
    small = Core({"l.0.w": torch.arange(64), "l.1.n": torch.arange(8), "emb": torch.arange(200)}, infos(2), "made")
    for blocks in (2, 4, 6):
        carried = carry_core(small, infos(blocks))
        half = blocks // 2
        assert set(carried.indices) == {
            "emb",
            *(f"l.{b}.w" for b in range(half)),
            *(f"l.{b}.n" for b in range(half, blocks)),
        }
    middle = carry_core(small, infos(3))  # the middle block of three lies between the two: the earlier one counts
    assert set(middle.indices) == {"emb", "l.0.w", "l.1.w", "l.2.n"}
    with pytest.raises(MaskError, match="only whole tensors"):
        carry_core(Core({"emb": torch.arange(3)}, infos(), "made"), infos(4))
    with pytest.raises(MaskError, match="no selected tensor in common"):
        carry_core(small, {"other": TensorInfo((3,), "bias", None, "other", 0)})
