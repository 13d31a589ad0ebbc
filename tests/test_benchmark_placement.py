"""The bench of placements: structures of one size, cells that leave the model as it was, and how scores are judged."""

from __future__ import annotations

import itertools
import math
from argparse import Namespace
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import gatedadapters as ga
from benchmarks.common.store import claimed
from benchmarks.studies.placement import cells, precision, regimes, structures, table
from benchmarks.studies.placement.judging import ceiling, judge, packed, predictions, unpacked
from benchmarks.studies.placement.structures import Unit, chosen
from gatedadapters.structure import Structure
from gatedadapters.testing.backbones import tiny

SIZE = 400


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and what is kept between processes go into the folder of the test; all compute in fp32."""
    monkeypatch.setattr(cells.STORE, "root", tmp_path)
    for module in (structures, precision):
        monkeypatch.setattr(module, "SCRATCH", tmp_path)
    (tmp_path / "placement").mkdir()
    (tmp_path / "placement" / "precision.txt").write_text("fp32", encoding="utf-8")
    precision.precision.cache_clear()


@pytest.fixture
def run() -> ModuleType:
    pytest.importorskip("peft")
    from benchmarks.studies.placement import run

    return run


def classifier() -> regimes.Problem:
    torch.manual_seed(0)
    backbone, sample = tiny("bert")
    model = ga.MultiTaskClassifier(backbone, {"parity": 2}, dropout=0.0)
    high = int(sample["input_ids"].max())
    rows = [[5 + (7 * i + j) % (high - 5) for j in range(6)] for i in range(24)]
    items = [{"input_ids": row, "attention_mask": [1] * 6, "labels": row[0] % 2} for row in rows]

    def collate(chosen: regimes.Items) -> regimes.Batch:
        return {name: torch.tensor([item[name] for item in chosen]) for name in chosen[0]}

    held_out = [collate(items[i : i + 4]) for i in range(0, 8, 4)]
    return regimes.Problem(model, lambda seed: items, collate, held_out, regimes.class_measure, heads=("heads",))


@pytest.fixture
def regime(monkeypatch: pytest.MonkeyPatch) -> regimes.Regime:
    space = (
        {"kind": "norm"},
        {"kind": "bias"},
        {"kind": "lora", "rank": 2},
        {"kind": "elements", "k": 32, "chunk": 16},
    )
    monkeypatch.setitem(regimes.SPACES, "test", space)
    return regimes.Regime("test", "test", SIZE, 3, 4, classifier, "test")


# -- structures --------------------------------------------------------------------------------------------------------


def units(*kinds: str, blocks: int = 6, ranks: int = 2, params: int = 10) -> list[Unit]:
    sites = [
        (k, role, b, r) for k in kinds for b in range(blocks) for role in ("attn.q", "ffn.up") for r in range(ranks)
    ]
    return [
        Unit(i, kind, role, role[:4], structures.THIRDS[3 * block // blocks], block, rank, params)
        for i, (kind, role, block, rank) in enumerate(sites)
    ]


def test_structures_have_one_size_and_never_repeat() -> None:
    found = chosen(units("lora", "norm", "bias", ranks=4), 123, "seed")
    assert len(found) == structures.COUNT
    assert len(set(found.values())) == len(found)
    assert {10 * len(kept) for kept in found.values()} == {120}
    strata = Counter(name.partition(":")[0] for name in found)
    assert strata.keys() == {"even", "kind", "depth", "role", "pair", "mix", "random"}
    assert strata["kind"] == 3


def test_structures_are_what_their_names_say() -> None:
    everything = units("lora", "norm", "bias", ranks=4)
    found = {name: [everything[i] for i in kept] for name, kept in chosen(everything, 120, "seed").items()}
    assert {unit.kind for unit in found["kind:norm"]} == {unit.kind for unit in found["mix:norm:0"]} == {"norm"}
    assert {(unit.role, unit.kind) for unit in found["role:attn.q:lora"]} == {("attn.q", "lora")}
    assert {unit.third for unit in found["depth:last:all"]} == {"last"}
    assert Counter(unit.kind for unit in found["pair:lora+norm"]) == {"lora": 6, "norm": 6}
    assert Counter(unit.kind for unit in found["even:all"]) == {"lora": 4, "norm": 4, "bias": 4}
    assert len({unit.kind for unit in found["random:0"]}) > 1


def test_an_even_spread_fills_first_ranks_everywhere_before_second_ones() -> None:
    everything = units("lora", blocks=9)
    kept = [everything[i] for i in chosen(everything, 90, "seed")["kind:lora"]]
    assert {unit.rank for unit in kept} == {0}
    assert abs(Counter(unit.role for unit in kept)["attn.q"] - 4.5) < 1
    for role in ("attn.q", "ffn.up"):
        depth = sorted(unit.block for unit in kept if unit.role == role)
        assert max(b - a for a, b in itertools.pairwise(depth)) <= 3


def test_structures_do_not_depend_on_how_many_there_are() -> None:
    everything = units("lora", "norm")
    few = chosen(everything, 120, "seed", count=9)
    assert list(few.items()) == list(chosen(everything, 120, "seed").items())[:9]
    assert chosen(everything, 120, "other")["random:0"] != few["random:0"]


def test_what_cannot_reach_the_size_is_left_out() -> None:
    found = chosen(units("lora", "norm", blocks=2, ranks=1), 60, "seed")  # each kind has 40 parameters
    assert "kind:norm" not in found
    assert "even:all" in found


def test_a_made_structure_is_read_back_by_other_processes(regime: regimes.Regime) -> None:
    found = structures.made(regime, count=12)
    assert all(structures.LEAST * SIZE <= structure.params <= SIZE for structure in found.values())
    assert regime.problem.model.state_dict().keys() == classifier().model.state_dict().keys()  # nothing is attached
    regime.__dict__.pop("problem")
    assert structures.made(regime, count=12) == found
    assert "problem" not in regime.__dict__  # read, not made again


# -- cells -------------------------------------------------------------------------------------------------------------


def test_a_cell_trains_one_structure_and_leaves_the_model_as_it_was(run: ModuleType, regime: regimes.Regime) -> None:
    found = structures.made(regime, count=2)
    name, structure = next(iter(found.items()))
    problem = regime.problem
    before = {key: value.clone() for key, value in problem.model.state_dict().items() if not key.startswith("heads")}
    forward = problem.model.forward
    first = run.compute(cells.Cell("test", name), regime, structure)
    assert problem.model.forward == forward
    after = problem.model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert after.keys() - before.keys() == {"heads.parity.weight", "heads.parity.bias"}
    assert first["params"] == structure.params == sum(first["kinds"].values())
    assert unpacked(first["losses"]).mean() == pytest.approx(first["loss"], rel=1e-3)
    assert len(unpacked(first["losses"])) == 8
    again = run.compute(cells.Cell("test", name), regime, structure)
    assert again["losses"] == first["losses"]
    other = run.compute(cells.Cell("test", name, seed=1), regime, structure)
    assert other["losses"] != first["losses"]


def test_training_in_bf16_leaves_no_autocast_in_the_model(
    run: ModuleType, regime: regimes.Regime, tmp_path: Path
) -> None:
    (tmp_path / "placement" / "precision.txt").write_text("bf16", encoding="utf-8")
    ((name, structure),) = structures.made(regime, count=1).items()
    forward = regime.problem.model.forward
    assert run.compute(cells.Cell("test", name), regime, structure)["precision"] == "bf16"
    assert regime.problem.model.forward == forward


def test_a_cell_that_another_process_computes_is_left_to_it(run: ModuleType, tmp_path: Path) -> None:
    cell, computed = cells.Cell("test", "kind:norm"), []

    def compute() -> dict[str, float]:
        computed.append(1)
        return {"loss": 1.0}

    with claimed(cells.STORE.loose / f"{cell.name}.lock") as ours:
        assert ours
        assert run.if_missing(cell, compute) is None
    assert run.if_missing(cell, compute) == {"loss": 1.0}
    assert run.if_missing(cell, compute) is None  # it is stored
    assert computed == [1]
    assert [file.suffix for file in cells.STORE.loose.iterdir()] == [".json"]


def speaker() -> regimes.Problem:
    torch.manual_seed(0)
    model, sample = tiny("llama", head="lm")
    rows = sample["input_ids"][:1].repeat(8, 1)
    items = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]

    def collate(chosen: regimes.Items) -> regimes.Batch:
        return {name: torch.stack([item[name] for item in chosen]) for name in chosen[0]}

    return regimes.Problem(model, lambda seed: items, collate, [collate(items[:4])], regimes.language_measure)


@pytest.mark.parametrize("arm", ["peft-lora", "peft-ia3", "peft-norms", "peft-adalora", "peft-eva"])
def test_rivals_learn_and_leave_the_model_as_it_was(arm: str, run: ModuleType) -> None:
    regime = regimes.Regime("test", "tiny", SIZE, 12, 4, speaker, "test")
    problem = regime.problem
    before = {key: value.clone() for key, value in problem.model.state_dict().items()}
    untuned = float(run.measured(problem)[0].mean())
    found = run.compute_arm(cells.ArmCell("test", arm, score="", rate=2e-2), regime)
    assert found["loss"] < untuned
    assert found["params"] > 0
    after = problem.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_arms_are_compared_at_their_best_rates_seed_by_seed() -> None:
    losses = {"allocated": (3.0, 2.8, 2.9), "even:all": (3.2, 3.3, 3.1), "random": (3.5, 3.4, 3.6)}
    for arm, by_rate in losses.items():
        assert cells.tuned("r", arm) is None  # nothing is measured
        for rate, loss in zip(cells.rates_of(arm), by_rate, strict=True):
            cell = cells.arm_cell("r", arm, 0, rate)
            place = "arm" if isinstance(cell, cells.ArmCell) else "cell"
            cells.STORE.write(cell.name, {place: asdict(cell), "loss": loss})
    assert [cells.tuned("r", arm) for arm in losses] == [1e-2, 2e-2, 1e-2]
    for arm, rate, loss in (("allocated", 1e-2, 2.7), ("even:all", 2e-2, 3.1), ("random", 1e-2, 3.5)):
        cell = cells.arm_cell("r", arm, 1, rate)
        place = "arm" if isinstance(cell, cells.ArmCell) else "cell"
        cells.STORE.write(cell.name, {place: asdict(cell), "loss": loss})
    rows = [row.split(" | ") for row in table.arms(cells.STORE.results()).splitlines()[2:]]
    assert [row[1] for row in rows] == ["allocated", "even:all", "random"]
    assert [row[4] for row in rows] == ["2.7500", "3.1000", "3.4500"]
    assert rows[1][5].startswith("-0.350 ±")  # -.3 and -.4
    assert rows[2][5].startswith("-0.700 ±")  # -.6 and -.8


def test_a_rate_is_chosen_by_the_mean_over_the_seeds_that_all_rates_have() -> None:
    losses = {5e-3: (3.0, 3.0, 1.0), 1e-2: (2.8, 2.9), 2e-2: (2.7, 3.3)}  # the first seed alone would choose the last
    for rate, of_seeds in losses.items():
        for seed, loss in enumerate(of_seeds):
            cell = cells.arm_cell("r", "allocated", seed, rate)
            cells.STORE.write(cell.name, {"arm": asdict(cell), "loss": loss})
    assert cells.tuned("r", "allocated") == 1e-2
    assert "0.01 of 3 | 2 | 2.8500" in table.arms(cells.STORE.results())


def test_any_beginning_of_the_cells_is_useful() -> None:
    names = [f"random:{i}" for i in range(30)]
    found = cells.cells_of("r", names)
    assert len({cell.name for cell in found}) == len(found) == 30 + cells.REPEATED * 4
    assert [cell.structure for cell in found[:15]] == names[:15]
    assert {cell.seed for cell in found[:25]} == {0, 1}


# -- regimes -----------------------------------------------------------------------------------------------------------


def test_the_head_is_drawn_anew_by_seed() -> None:
    problem = classifier()
    head = problem.model.get_parameter("heads.parity.weight")
    problem.reset(1)
    first = head.detach().clone()
    problem.reset(2)
    assert not torch.equal(head, first)
    problem.reset(1)
    assert torch.equal(head, first)


def test_permuted_word_pieces_are_a_permutation_that_spares_special_ones() -> None:
    table = regimes.permutation(0.5, 1996, 30522)
    assert sorted(table) == list(range(30522))
    assert (table[:1996] == np.arange(1996)).all()
    assert (table != np.arange(30522)).mean() == pytest.approx(0.5 * (1 - 1996 / 30522), abs=0.01)


def test_policy_gradient_is_that_of_the_expected_reward() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4).requires_grad_(), torch.tensor([0, 3, 1])
    (exact,) = torch.autograd.grad(-logits.softmax(-1).gather(1, labels[:, None]).mean(), logits)
    drawn = torch.stack([regimes.policy_gradient(logits, labels).mean() for _ in range(8000)]).mean()
    (estimate,) = torch.autograd.grad(drawn, logits)
    assert torch.allclose(estimate, exact, atol=0.006)


def test_rewards_are_measured_by_the_chance_of_the_right_class() -> None:
    problem = classifier()
    batch = problem.held_out[0]
    missed, right = regimes.reward_measure(problem.model, batch)
    losses, _ = regimes.class_measure(problem.model, batch)
    assert torch.allclose(missed, 1 - torch.exp(-losses))
    assert right.dtype == torch.bool


# -- judging -----------------------------------------------------------------------------------------------------------

LOSSES = {"kind:norm": 3.0, "kind:lora": 3.2, "random:0": 3.4, "random:1": 3.3}


def test_judging_a_case_by_hand() -> None:
    perfect = judge({name: -loss for name, loss in LOSSES.items()}, LOSSES)
    assert (perfect.tau, perfect.pick, perfect.regret, perfect.share) == (1.0, "kind:norm", 0.0, 0.0)
    # Five of six pairs are in order; the pick lies .2 above the best, the mean random structure .35.
    swapped = judge({"kind:lora": 4.0, "kind:norm": 3.0, "random:1": 2.0, "random:0": 1.0}, LOSSES)
    assert swapped.tau == pytest.approx((5 - 1) / 6)
    assert (swapped.pick, swapped.regret) == ("kind:lora", pytest.approx(0.2))
    assert swapped.share == pytest.approx(0.2 / 0.35)
    constant = judge(dict.fromkeys(LOSSES, 1.0), LOSSES)
    assert constant.tau == 0.0


def test_structures_without_a_prediction_are_not_judged() -> None:
    found = judge({"kind:lora": 1.0, "kind:norm": 2.0, "unknown": 9.0}, LOSSES)
    assert found.structures == 2
    assert math.isnan(found.share)  # there is no random structure to compare with


def test_the_ceiling_is_what_two_seeds_agree_on() -> None:
    a, b = {"x": 1.0, "y": 2.0, "z": 3.0}, {"x": 1.0, "y": 3.0, "z": 2.0}
    assert ceiling([a, b]) == pytest.approx(1 / 3)
    assert ceiling([a, b, a]) == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)
    assert math.isnan(ceiling([a]))
    assert ceiling([a, b, {"x": 1.0}]) == pytest.approx(1 / 3)  # nothing to compare the third with


def test_losses_of_texts_survive_packing() -> None:
    losses = np.array([0.0, 0.5, 3.094, 11.0])
    assert np.allclose(unpacked(packed(losses)), losses, rtol=1e-3)


def test_anything_that_values_structures_can_be_judged(regime: regimes.Regime) -> None:
    @dataclass
    class CountsPaths:
        def value(self, structure: Structure) -> float:
            return float(len(structure.paths))

    found = structures.made(regime, count=3)
    assert predictions(CountsPaths(), found) == {name: len(structure.paths) for name, structure in found.items()}


@pytest.mark.parametrize("score", ["moved", "random"])
def test_scores_of_the_library_are_judged_by_their_name(run: ModuleType, regime: regimes.Regime, score: str) -> None:
    found = structures.made(regime, count=3)
    result = run.compute_score(cells.ScoreCell("test", score), regime, found)
    assert result["values"].keys() == found.keys()
    assert len(set(result["values"].values())) == 3
    assert not [name for name, _ in regime.problem.model.named_modules() if "gated" in name]


# -- tables ------------------------------------------------------------------------------------------------------------


def put(regime: str, losses: dict[str, float], seed: int = 0, rate: float = cells.COMMON_RATE) -> None:
    for name, loss in losses.items():
        cell = cells.Cell(regime, name, seed, rate)
        cells.STORE.write(cell.name, {"cell": vars(cell), "loss": loss})


def put_score(regime: str, score: str, values: dict[str, float]) -> None:
    cell = cells.ScoreCell(regime, score)
    cells.STORE.write(cell.name, {"score": vars(cell), "values": values, "seconds": 7.0})


def test_tables_show_scores_and_the_best_guess_of_each_regime() -> None:
    put("tweets-1536", LOSSES)
    put("tweets-1536", {**LOSSES, "random:0": 3.1}, seed=1)
    put("tweets-1536", {"kind:norm": 0.1}, rate=1e-1)  # another rate does not count
    put("newsgroups-3072", {**LOSSES, "kind:lora": 2.9})
    put_score("tweets-1536", "moved", {name: -loss for name, loss in LOSSES.items()})
    scores, _, guesses = table.tables().partition("\n\n")
    (row,) = [line for line in scores.splitlines() if "| moved |" in line]
    assert row == "| tweets-1536 | moved | 1.00 | 0.33 | 3.00 | kind:norm | 0.0000 | 0.00 | 4 | 1 | 7 |"
    assert "| guess | newsgroups-3072 | tweets-1536 |" in guesses
    assert "| kind:norm | -0.3500 | **-0.3500** |" in guesses
    assert "| kind:lora | **-0.4500** | -0.1500 |" in guesses
    assert "| best of all | -0.4500 kind:lora | -0.3500 kind:norm |" in guesses


def test_regimes_of_one_group_are_shown_by_their_mean() -> None:
    shift = ("shift-pieces", "shift-leet", "shift-reviews")
    for number, regime in enumerate(shift):
        put(regime, {name: loss + number for name, loss in LOSSES.items()})
    put(shift[0], {"kind:bias": 0.0})  # the others lack it
    put_score(shift[0], "moved", {name: -loss for name, loss in LOSSES.items()})
    put_score(shift[1], "moved", LOSSES)
    scores, _, guesses = table.tables().partition("\n\n")
    (row,) = [line for line in scores.splitlines() if "| moved |" in line]
    assert row.startswith("| shifts | moved | 0.00 |")
    assert "| kind:norm | **-0.3500** |" in guesses
    assert "| mean random loss | 4.3500 |" in guesses
    assert "kind:bias" not in guesses


def test_every_regime_can_spend_its_size() -> None:
    assert set(regimes.TUNING) <= regimes.REGIMES.keys()
    assert {table.group_of(name) for name in regimes.REGIMES} == {regime.group for regime in regimes.REGIMES.values()}
    for regime in regimes.REGIMES.values():
        assert regime.search_space.paths


def test_sizes_are_predicted_and_then_trained(run: ModuleType, regime: regimes.Regime) -> None:
    cell = cells.FrontierCell("test")
    predicted = run.if_missing(cell, run.compute_frontier, cell, regime)
    sizes = [point["params"] for point in predicted["points"]]
    assert sizes == sorted(set(sizes))
    assert len(sizes) > 2
    structure = Structure.from_json(predicted["points"][1]["structure"])
    for rate in (1e-3, 1e-2):
        place = cells.PointCell("test", 1, rate=rate)
        assert run.if_missing(place, run.compute_point, place, regime, structure)["params"] == sizes[1]
    (row,) = table.frontiers(cells.STORE.results()).splitlines()[2:]
    losses = [cells.read(cells.PointCell("test", 1, rate=rate))["loss"] for rate in (1e-3, 1e-2)]
    assert row.split(" | ")[2:] == [f"{sizes[1]:,}", f"{predicted['points'][1]['loss']:.4f}", f"{min(losses):.4f} |"]


def test_losses_of_single_texts_are_packed_of_the_structures_that_scores_are_judged_on() -> None:
    chosen = cells.arm_cell("r", "allocated", 0, 1e-2)
    every = {
        "judged": {"cell": asdict(cells.Cell("r", "even:all", 0, 1e-2))},
        "another rate": {"cell": asdict(cells.Cell("r", "even:all", 0, 2e-2))},
        "another seed": {"cell": asdict(cells.Cell("r", "even:all", 1, 1e-2))},
        "an arm": {"arm": asdict(chosen)},
    }
    for name, place in every.items():
        cells.STORE.write(name, {**place, "loss": 1.0, "losses": "AAAA"})
    cells.STORE.pack()
    packed = cells.STORE.results()
    assert {name for name, result in packed.items() if "losses" in result} == {"judged"}
    assert all(result["loss"] == 1.0 for result in packed.values())


def test_a_frontier_goes_on_where_it_was_packed(
    run: ModuleType, regime: regimes.Regime, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"REGIMES": {"test": regime}, "POINT_RATES": (1e-2,), "BUDGETS": 2}.items():
        monkeypatch.setattr(run, name, value)
    cell = cells.FrontierCell("test")
    points = run.if_missing(cell, run.compute_frontier, cell, regime)["points"]
    cells.STORE.pack()
    assert cells.read(cell)["points"] == [{"params": p["params"], "loss": p["loss"]} for p in points]
    run.frontier_all(Namespace(regimes=["test"], seeds=[0]))
    trained = [cells.read(cells.PointCell("test", number, rate=1e-2)) for number in range(len(points))]
    assert [result["params"] for result in trained] == [point["params"] for point in points]


def test_choosing_is_timed_beside_training_what_was_chosen(run: ModuleType, regime: regimes.Regime) -> None:
    cell = cells.CostCell("test", steps=4)
    run.if_missing(cell, run.compute_cost, cell, regime)
    times = {what: {"wall": 1.0, "cpu": cpu} for what, cpu in (("allocate", 6.0), ("search", 30.0), ("train", 20.0))}
    found = cells.read(cell)
    assert found["times"].keys() == times.keys()
    assert all(seconds["cpu"] > 0 for seconds in found["times"].values())
    (row,) = table.costs({cell.name: {**found, "times": times}}).splitlines()[2:]
    assert row == "| test | 4 | 20 | 30 | 6 | 1.50 | 0.3% |"
