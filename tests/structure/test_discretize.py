"""The one hard rule: never above a budget, and as close under it as the units allow."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import gatedadapters as ga
from gatedadapters.config import Budget, GateConfig
from gatedadapters.errors import BudgetError
from gatedadapters.gates import GateBank, GateGroup
from gatedadapters.structure.discretize import choose_units
from gatedadapters.testing import tiny

TRIALS = range(60)


def random_bank(dice: random.Random, *, tasks: int = 1) -> GateBank:
    """Anything: few or many paths, cheap and dear, any levels, gates anywhere."""
    groups = [
        GateGroup(
            f"{i}",
            f"b{i // 4}",
            f"p{i // 2}",
            units=dice.choice([1, 2, 8, 16]),
            params=dice.choice([3, 10, 128, 700]),
            flops=float(dice.randint(1, 1000)),
        )
        for i in range(dice.randint(1, 60))
    ]
    levels = dice.choice([("rank",), ("path",), ("block", "rank"), ("block", "point", "path", "rank")])
    bank = GateBank(groups, GateConfig(levels=levels), tasks=tasks, seed=dice.randint(0, 999))
    with torch.no_grad():
        bank.log_alpha.uniform_(-4.6, 4.6, generator=torch.Generator().manual_seed(dice.randint(0, 999)))
    return bank


def random_budget(dice: random.Random, bank: GateBank, *, per_task: float | None = None) -> Budget:
    unit = dice.choice(["params", "flops"])
    dense, least = bank.dense_cost(unit), float(bank.cost(unit).min())
    amount = max(least, dense * dice.choice([0.01, 1 / 32, 1 / 8, 0.5, 0.9, 1.0]))
    cap = None if per_task is None else per_task * amount
    return Budget(params=int(amount) + 1, per_task=cap) if unit == "params" else Budget(flops=amount, per_task=cap)


def spent(bank: GateBank, kept: Tensor, unit: str) -> float:
    return float((kept.amax(0) * bank.cost(unit)).sum())


@pytest.mark.parametrize("trial", TRIALS)
def test_a_budget_is_never_exceeded_and_nothing_more_would_fit(trial: int) -> None:
    dice = random.Random(trial)
    bank = random_bank(dice)
    budget = random_budget(dice, bank)
    limit = budget.resolve(bank.dense_cost(budget.unit))
    kept = choose_units(bank, budget)
    used, cost = spent(bank, kept, budget.unit), bank.cost(budget.unit)
    assert used <= limit * (1 + 1e-12)
    dropped = cost[kept[0] == 0]
    assert not len(dropped) or used + float(dropped.min()) > limit, "another unit would have fitted"
    if float(cost.max()) <= 0.02 * limit:
        assert used >= min(0.98 * limit, bank.dense_cost(budget.unit) * (1 - 1e-9))


@pytest.mark.parametrize("trial", TRIALS)
def test_a_cap_holds_for_every_task_and_the_budget_for_their_union(trial: int) -> None:
    dice = random.Random(trial)
    bank = random_bank(dice, tasks=dice.randint(2, 4))
    budget = random_budget(dice, bank, per_task=dice.choice([0.3, 0.6, 1.0]))
    dense = bank.dense_cost(budget.unit)
    cap = budget.resolve_task(dense)
    assert cap is not None
    if cap < float(bank.cost(budget.unit).min()):
        with pytest.raises(BudgetError, match="cap per task"):
            choose_units(bank, budget)
        return
    kept = choose_units(bank, budget)
    assert spent(bank, kept, budget.unit) <= budget.resolve(dense) * (1 + 1e-12)
    assert (kept.double() @ bank.cost(budget.unit) <= cap * (1 + 1e-12)).all()


def test_units_are_taken_in_order_of_their_probability() -> None:
    groups = [GateGroup("a", "b", "p", units=6, params=10, flops=1.0)]
    bank = GateBank(groups, GateConfig(), tasks=1, seed=0)
    with torch.no_grad():
        bank.log_alpha.copy_(torch.tensor([[-1.0, 3.0, 0.5, -4.0, 2.0, 1.0]]))
    for count, expected in ((1, {1}), (3, {1, 4, 5}), (5, {0, 1, 2, 4, 5})):
        kept = choose_units(bank, Budget(params=10 * count + 9))
        assert set(kept[0].nonzero().flatten().tolist()) == expected


def test_a_path_gets_its_second_unit_where_it_is_twice_as_likely_as_the_first_of_another() -> None:
    groups = [GateGroup(key, key, key, units=3, params=10, flops=1.0) for key in "ab"]
    bank = GateBank(groups, GateConfig(), tasks=1, seed=0)
    with torch.no_grad():
        bank.log_alpha.copy_(torch.tensor([[4.0, 3.9, 3.8, 0.0, -2.5, -2.5]]))  # P: .996, .996, .995, .83, .28, .28
    assert choose_units(bank, Budget(params=20)).tolist() == [[1.0, 0.0, 0.0, 1.0, 0.0, 0.0]]
    assert choose_units(bank, Budget(params=40)).tolist() == [[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]


def test_scores_replace_the_probability_at_the_same_budget() -> None:
    bank = random_bank(random.Random(3))
    budget = Budget(fraction=0.25)
    chosen = choose_units(bank, budget, torch.arange(bank.n_units, dtype=torch.float32)[None] + 1)
    first = int(chosen[0].nonzero()[-1])
    assert first == bank.n_units - 1
    assert spent(bank, chosen, "params") <= 0.25 * bank.dense_cost()


def test_without_a_budget_what_the_test_time_gate_leaves_open_stays() -> None:
    bank = random_bank(random.Random(1), tasks=2)
    assert torch.equal(choose_units(bank, None), (bank.deterministic() > 0).float())


def test_a_unit_paid_for_by_one_task_is_free_for_another_whose_gate_is_open() -> None:
    groups = [GateGroup("a", "b", "p", units=3, params=10, flops=1.0)]
    bank = GateBank(groups, GateConfig(), tasks=2, seed=0)
    with torch.no_grad():
        bank.log_alpha.copy_(torch.tensor([[3.0, 1.0, -4.0], [2.0, -4.0, 0.5]]))
    kept = choose_units(bank, Budget(params=20))
    assert kept.tolist() == [[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


def test_a_task_whose_gates_are_all_less_likely_is_not_starved() -> None:
    groups = [GateGroup("a", "b", "p", units=4, params=10, flops=1.0)]
    bank = GateBank(groups, GateConfig(), tasks=2, seed=0)
    with torch.no_grad():
        bank.log_alpha.copy_(torch.tensor([[4.0, 3.5, -4.0, -4.0], [-4.0, -4.0, 0.0, -0.5]]))
    kept = choose_units(bank, Budget(params=20))
    assert kept.tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]


def test_after_a_structure_is_fixed_only_what_it_kept_is_offered() -> None:
    bank = random_bank(random.Random(5))
    first = choose_units(bank, Budget(fraction=0.5))
    bank.fix(first)
    second = choose_units(bank, Budget(fraction=0.2))
    assert (second <= first).all()
    assert 0 < second.sum() < first.sum()
    assert torch.equal(choose_units(bank, None), first)


def test_a_budget_below_the_smallest_unit_is_refused() -> None:
    bank = GateBank([GateGroup("a", "b", "p", 4, 100, 7.0)], GateConfig(), tasks=1, seed=0)
    with pytest.raises(BudgetError, match=r"(?s)at least 100 params.*got:\s+99.*where:.*fix:"):
        choose_units(bank, Budget(params=99))
    with pytest.raises(BudgetError, match="at least 7 flops"):
        choose_units(bank, Budget(flops=6.9))


@pytest.mark.parametrize("space", ["lora-all-linear", "decoder-mixed"])
@pytest.mark.parametrize("tasks", [("one",), ("a", "b", "c")], ids=len)
def test_the_parameters_stored_are_what_the_structure_counts(space: str, tasks: tuple[str, ...]) -> None:
    for fraction in (0.02, 1 / 8, 0.5):
        model, batch = tiny("llama")
        adapters = ga.attach(model, space, batch, tasks=tasks)
        bank = adapters.bank
        assert bank is not None
        with torch.no_grad():
            bank.log_alpha.uniform_(-4, 4, generator=torch.Generator().manual_seed(0))
        budget = Budget(fraction=fraction)
        structure = adapters.discretize(budget)
        limit = fraction * bank.dense_cost()
        assert structure.dense_params == bank.dense_cost()
        assert structure.params <= limit
        assert structure.params >= 0.98 * limit or float(bank.cost("params").max()) > 0.02 * limit
        adapters.compact(structure)
        stored = sum(p.numel() for p in adapters.paths.parameters())
        routing = (b for b in adapters.paths.buffers() if b.is_floating_point())  # where there are several tasks
        stored += sum(b.numel() for b in routing)
        assert stored == structure.params


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.6])
def test_no_task_is_said_to_use_what_is_closed_for_it_for_good(fraction: float) -> None:
    model, batch = tiny("llama")
    adapters = ga.attach(model, "lora-all-linear", batch, tasks=("a", "b"))
    bank = adapters.bank
    assert bank is not None
    with torch.no_grad():
        bank.log_alpha.uniform_(-5, 3, generator=torch.Generator().manual_seed(1))
        bank.log_alpha[0] -= 2  # mostly closed for the first task, which still has its turns
    structure = adapters.discretize(Budget(fraction=fraction))
    assert structure.for_task("a").params > 0
    gates = bank.deterministic()
    for record in structure.paths:
        own = gates[:, bank.slices[record.key]]
        for task, units in record.units.items():
            assert all(own["ab".index(task), unit] > 0 or (own[:, unit] == 0).all() for unit in units)


def test_a_unit_given_to_a_task_by_hand_can_learn_there() -> None:
    model, batch = tiny("llama")
    adapters = ga.attach(model, "lora-all-linear", batch, tasks=("a", "b"))
    bank = adapters.bank
    assert bank is not None
    with torch.no_grad():
        bank.log_alpha[0], bank.log_alpha[1] = 4.0, -4.0
    adapters.prune(adapters.discretize(scores=torch.ones_like(bank.log_alpha)))
    assert (bank.kept == 1).all()
