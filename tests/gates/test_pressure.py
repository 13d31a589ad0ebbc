"""What holds the adapter small: an L0 weight that means the same everywhere, a budget that is met and not overshot."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gatedadapters.config import L0, Budget, GateConfig, Schedule
from gatedadapters.errors import BudgetError
from gatedadapters.gates import GateBank, GateGroup, Pressure

RANKS = ("rank",)
ALL = ("block", "point", "path", "rank")
NO_PRUNE = Schedule(warmup=0.25, ramp=0.6, prune=None)


def bank_of(
    layers: int = 6, levels: Sequence[str] = RANKS, *, tasks: int = 1, seed: int = 0, **gates: object
) -> GateBank:
    """Four points a layer, each with 8 units; costs differ between points, and in flops otherwise than in params."""
    groups = [
        GateGroup(f"{i}/{j}:lora", f"{i}", f"{i}.{j}", units=8, params=40 + 8 * j, flops=50.0 - 7 * j)
        for i in range(layers)
        for j in range(4)
    ]
    return GateBank(groups, GateConfig.parse({"levels": levels, **gates}, where="test"), tasks=tasks, seed=seed)


def at(bank: GateBank, progress: float, total_steps: int = 1000) -> GateBank:
    bank.step.fill_(1 + round(progress * total_steps))
    return bank


# -- L0 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["params", "flops"])
@pytest.mark.parametrize("levels", [RANKS, ALL], ids="-".join)
def test_one_l0_weight_means_the_same_on_2_layers_and_on_20(levels: tuple[str, ...], unit: str) -> None:
    terms = []
    for layers in (2, 20):
        bank = bank_of(layers, levels)
        with torch.no_grad():
            bank.log_alpha.fill_(0.7)
        terms.append(Pressure(bank, L0(weight=3.0, unit=unit), Schedule(), total_steps=None).term(bank))
    torch.testing.assert_close(terms[0], terms[1])
    share = torch.sigmoid(torch.tensor(0.7 + 2 / 3 * 2.3978952728)) ** len(levels)  # log(1.1 / 0.1)
    torch.testing.assert_close(terms[0].detach(), 3.0 * share)


def test_l0_acts_by_cost_not_by_number_of_gates() -> None:
    bank = bank_of()
    Pressure(bank, L0(weight=1.0), Schedule(), total_steps=None).term(bank).backward()
    params = bank.params / bank.params.sum()
    p = torch.sigmoid(bank.log_alpha[0].detach().double() + 2 / 3 * 2.3978952728)
    torch.testing.assert_close(bank.log_alpha.grad[0].double(), params * p * (1 - p), rtol=1e-4, atol=1e-9)


# -- schedule ----------------------------------------------------------------------------------------------


def test_l0_waits_for_the_warm_up_then_ramps_then_stays() -> None:
    bank = bank_of()
    pressure = Pressure(bank, L0(weight=2.0), Schedule(warmup=0.2, ramp=0.6, prune=None), total_steps=1000)
    full = 2.0 * bank.expected_cost().detach() / bank.dense_cost()
    for progress, share in [(0.0, 0), (0.1, 0), (0.199, 0), (0.3, 0.25), (0.5, 0.75), (0.6, 1), (1.0, 1)]:
        torch.testing.assert_close(pressure.term(at(bank, progress)).detach(), share * full)


def test_before_the_warm_up_ends_the_penalty_moves_no_gate() -> None:
    for penalty in (L0(weight=1.0), Budget(fraction=0.1)):
        bank = at(bank_of(), 0.1)
        pressure = Pressure(bank, penalty, NO_PRUNE, total_steps=1000)
        before = bank.log_alpha.detach().clone()
        pressure.ascend(bank)
        assert float(pressure.term(bank).detach()) == 0.0
        assert torch.equal(bank.log_alpha, before)


def test_the_target_falls_from_what_is_open_to_what_the_budget_pays_for() -> None:
    bank = bank_of(init_spread=0.0)
    pressure = Pressure(bank, Budget(fraction=0.125), Schedule(warmup=0.2, ramp=0.6, prune=None), total_steps=10_000)
    assert pressure.target(at(bank, 0.1, 10_000)) == bank.dense_cost()
    targets = [pressure.target(at(bank, 0.2001 + i / 125, 10_000)) for i in range(100)]
    assert targets[0] == pytest.approx(float(bank.expected_cost().detach()), rel=1e-3)
    assert targets == sorted(targets, reverse=True)
    # the expected cost of a Structure of exactly that size, its gates at the ends of their range
    kept = bank.cost("params").cumsum(0) <= 0.125 * bank.dense_cost()
    with torch.no_grad():
        bank.log_alpha.copy_(torch.where(kept, 4.6, -4.6))
    assert targets[-1] == pytest.approx(float(bank.expected_cost().detach()), rel=0.02)
    bank.fix(kept[None].float())
    assert pressure.target(bank) == 0.125 * bank.dense_cost()


def test_what_is_kept_of_what_is_open_is_the_last_target_by_the_present_one() -> None:
    bank = bank_of()
    schedule = Schedule(warmup=0.2, ramp=0.6, prune=0.7)
    pressure = Pressure(bank, Budget(fraction=0.125), schedule, total_steps=1000)
    last = pressure.target(at(bank, 0.65))
    for progress in (0.21, 0.3, 0.45, 0.6, 0.69):
        assert pressure.kept_share(progress) == pytest.approx(last / pressure.target(at(bank, progress)), rel=1e-2)
    assert pressure.kept_share(0.0) == pytest.approx(last / float(bank.expected_cost().detach()), rel=1e-2)
    assert pressure.kept_share(0.7) == pressure.kept_share(1.0) == 1.0
    assert Pressure(bank, L0(weight=1.0), schedule, total_steps=1000).kept_share(0.1) == 1.0


def test_pruning_is_due_at_its_share_of_the_steps_and_only_once() -> None:
    bank = bank_of()
    pressure = Pressure(bank, Budget(fraction=0.5), Schedule(prune=0.65), total_steps=100)
    due = []
    for step in range(1, 101):
        bank.draw()
        assert pressure.prune_is_due(bank) == (step > 65)  # in the middle of the step
        bank.next_step()
        due += [step] if pressure.prune_is_due(bank) else []
    assert due == list(range(65, 101))
    bank.fix(torch.ones(1, bank.n_units))
    assert not pressure.prune_is_due(bank)
    assert float(pressure.term(bank)) == 0.0


def test_a_pressure_counts_the_steps_from_when_it_was_set() -> None:
    bank = at(bank_of(), 0.5, 100)  # gates that were trained before
    pressure = Pressure(bank, Budget(fraction=0.5), Schedule(prune=0.65), total_steps=200)
    assert pressure.progress(bank) == 0.0
    before = int(bank.step)
    due = []
    for step in range(1, 201):
        bank.step.fill_(before + step)
        due += [step] if pressure.prune_is_due(bank) else []
    assert due == list(range(130, 201))
    resumed = Pressure(bank_of(), Budget(fraction=0.5), Schedule(prune=0.65), total_steps=200)
    resumed.load_state_dict(pressure.state_dict())
    assert resumed.progress(bank) == pressure.progress(bank) == 199 / 200


# -- a budget over a whole search --------------------------------------------------------------------------


def search(
    bank: GateBank,
    budget: Budget,
    *,
    steps: int,
    scale: float = 1.0,
    noise: float = 0.0,
    rate: float | None = None,
    optimizer: str = "adam",
    seed: int = 0,
) -> tuple[list[float], list[Tensor], Pressure]:
    """Gates that all want to be open, some more than others, under a budget; no model.

    Returns the expected cost in each step as a share of the dense cost, that of each task, and the pressure.
    """
    pressure = Pressure(bank, budget, NO_PRUNE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    wish = torch.randn(bank.tasks, bank.n_units, generator=generator).exp() * scale / bank.n_units
    rate = rate or min(0.3, 8 / (0.35 * steps))
    kind = torch.optim.Adam if optimizer == "adam" else torch.optim.SGD
    stepper = kind(bank.parameters(), lr=rate)
    union, each = [], []
    dense = bank.dense_cost(budget.unit)
    for _ in range(steps):
        bank.draw()
        pressure.ascend(bank)
        union.append(float(bank.expected_cost(budget.unit).detach()) / dense)
        each.append(bank.expected_task_cost(budget.unit).detach() / dense)
        seen = wish * (1 + noise * torch.randn(wish.shape, generator=generator))
        loss = pressure.term(bank)
        for key, where in bank.slices.items():
            gate = bank.gate_for(key)
            if gate is not None:
                loss = loss - (gate * seen[:, where]).sum()
        if loss.requires_grad:
            loss.backward()
        stepper.step()
        stepper.zero_grad()
    return union, each, pressure


@pytest.mark.parametrize("steps", [40, 150])
@pytest.mark.parametrize("levels", [RANKS, ALL], ids="-".join)
@pytest.mark.parametrize("fraction", [0.5, 1 / 8, 1 / 32])
def test_a_budget_is_met_and_never_overshot(fraction: float, levels: tuple[str, ...], steps: int) -> None:
    for scale, noise in ((1.0, 5.0), (1e-3, 0.0), (1e3, 1.0)):
        bank = bank_of(4, levels)
        union, _, pressure = search(bank, Budget(fraction=fraction), steps=steps, scale=scale, noise=noise)
        final = pressure.target(bank) / bank.dense_cost()
        assert union[-1] == pytest.approx(final, rel=0.01)
        assert min(union) > 0.98 * final
        assert union[round(0.65 * steps)] == pytest.approx(final, rel=0.01), "not there when pruning is due"


@pytest.mark.parametrize(("rate", "optimizer"), [(0.01, "adam"), (0.3, "adam"), (1.0, "sgd")])
def test_a_budget_is_met_whatever_moves_the_gates(rate: float, optimizer: str) -> None:
    bank = bank_of(levels=("block", "rank"))
    budget = Budget(flops=0.2 * bank.dense_cost("flops"))
    union, _, pressure = search(bank, budget, steps=100, rate=rate, optimizer=optimizer)
    final = pressure.target(bank) / bank.dense_cost("flops")
    assert union[-1] == pytest.approx(final, rel=0.01)
    assert min(union) > 0.98 * final


def test_what_a_budget_keeps_is_what_the_loss_values_most_later_units_of_a_path_for_less() -> None:
    bank = bank_of()
    budget = Budget(fraction=1 / 8)
    search(bank, budget, steps=200, noise=2.0)
    wish = torch.randn(1, bank.n_units, generator=torch.Generator().manual_seed(0)).exp()[0]
    count = bank.n_units // 8
    best, found = (
        torch.bincount(bank.owner[values.argsort(descending=True)[:count]], minlength=len(bank.groups))
        for values in (wish / bank.cost("params") / bank.rank_within_path(wish), bank.open_probability()[0])
    )
    assert int(torch.minimum(best, found).sum()) > 0.7 * count, "units a path"


def test_units_go_to_paths_in_proportion_to_what_they_gain_not_all_to_the_steepest() -> None:
    gains = {"steep": 3.0, "flat": 1.0}
    groups = [GateGroup(key, key, key, units=8, params=10, flops=1.0) for key in gains]
    bank = GateBank(groups, GateConfig(shrink=False), tasks=1, seed=0)
    pressure = Pressure(bank, Budget(fraction=0.5), NO_PRUNE, total_steps=300)
    stepper = torch.optim.Adam(bank.parameters(), lr=0.05)
    for _ in range(300):
        bank.draw()
        pressure.ascend(bank)
        loss = pressure.term(bank)
        for key, gain in gains.items():
            gate = bank.gate_for(key)
            loss = loss if gate is None else loss - gain * gate.sum()
        loss.backward()
        stepper.step()
        stepper.zero_grad()
    likeliest = bank.open_probability()[0].argsort(descending=True)[:8]
    assert torch.bincount(bank.owner[likeliest]).tolist() == [6, 2]


def test_an_l0_weight_charges_every_unit_alike_however_crowded() -> None:
    bank = bank_of()
    with torch.no_grad():
        bank.log_alpha.normal_(generator=torch.Generator().manual_seed(0))
    pressure = Pressure(bank, L0(weight=2.0), Schedule(warmup=0, ramp=0, prune=None), total_steps=10)
    (slope,) = torch.autograd.grad(pressure.term(bank), bank.log_alpha)
    p = bank.open_probability().detach()
    torch.testing.assert_close(slope, (2 * bank.cost("params") / bank.dense_cost() * p * (1 - p)).float())


def test_a_cap_per_task_is_met_beside_the_budget_of_all() -> None:
    bank = bank_of(tasks=3)
    budget = Budget(fraction=0.4, per_task=0.15)
    _, each, pressure = search(bank, budget, steps=150)
    floor = 1 / (1 + 100 * (1 / 11) ** (2 / 3))  # P(open) at the lower bound of log alpha
    cap = floor + (1 - floor) * 0.15
    assert (each[-1] < 1.01 * cap).all()
    assert (each[-1] > 0.9 * cap).all()
    assert (pressure.multipliers > 0).all()


def test_a_slack_budget_does_not_lift_what_the_loss_closes() -> None:
    bank = bank_of()
    pressure = Pressure(bank, Budget(fraction=0.9), NO_PRUNE, total_steps=200)
    stepper = torch.optim.Adam(bank.parameters(), lr=0.1)
    for _ in range(200):
        bank.draw()
        pressure.ascend(bank)
        gate = torch.cat([g for key in bank.slices if (g := bank.gate_for(key)) is not None], 1)
        (gate.mean() + pressure.term(bank)).backward()
        stepper.step()
        stepper.zero_grad()
    assert float(bank.expected_cost().detach()) < 0.3 * bank.dense_cost()


def test_the_pressure_resumes_where_it_was() -> None:
    bank = bank_of()
    _, _, pressure = search(bank, Budget(fraction=0.2), steps=50)
    state = copy.deepcopy(pressure.state_dict())
    fresh = Pressure(bank, Budget(fraction=0.2), NO_PRUNE, total_steps=50)
    assert not torch.equal(fresh.multipliers, pressure.multipliers)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.multipliers, pressure.multipliers)
    torch.testing.assert_close(fresh.term(bank), pressure.term(bank))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_multipliers_stay_in_fp32_when_the_model_is_cast(dtype: torch.dtype) -> None:
    pressure = Pressure(bank_of(tasks=2), Budget(fraction=0.2), Schedule(), total_steps=10)
    pressure.multipliers.fill_(1.001)
    torch.nn.ModuleList([pressure]).to(dtype)
    assert torch.equal(pressure.multipliers, torch.full((3,), 1.001))


# -- bad budgets -------------------------------------------------------------------------------------------


def test_a_budget_below_the_smallest_unit_says_what_the_least_is() -> None:
    with pytest.raises(BudgetError, match=r"(?s)at least 40 params.*got:\s+39.*where:.*fix:"):
        Pressure(bank_of(), Budget(params=39), Schedule(), total_steps=10)
    with pytest.raises(BudgetError, match="at least 320 params"):  # whole paths are the smallest units here
        Pressure(bank_of(levels=("path",)), Budget(params=300), Schedule(), total_steps=10)


def test_a_cap_per_task_below_the_smallest_unit_is_refused_too() -> None:
    bank = bank_of(tasks=2)
    with pytest.raises(BudgetError, match=r"(?s)cap per task.*at least 40 params.*got:\s+39.*raise the cap"):
        Pressure(bank, Budget(params=1000, per_task=39), Schedule(), total_steps=10)
    Pressure(bank, Budget(params=1000, per_task=40), Schedule(), total_steps=10)


def test_a_budget_needs_the_length_of_training() -> None:
    for steps in (None, 0):
        with pytest.raises(BudgetError, match=r"(?s)total_steps.*fix:.*GatedTrainer"):
            Pressure(bank_of(), Budget(fraction=0.5), Schedule(), total_steps=steps)
