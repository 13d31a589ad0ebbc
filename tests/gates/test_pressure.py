"""What holds the adapter small: an L0 weight that means the same everywhere, a budget that is met and not overshot."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from gatedadapters.config import L0, Budget, GateConfig, Schedule
from gatedadapters.errors import BudgetError
from gatedadapters.gates import GateBank, Group, Pressure

RANKS = ("rank",)
ALL = ("block", "point", "path", "rank")


def bank_of(
    layers: int = 6, levels: Sequence[str] = RANKS, *, tasks: int = 1, seed: int = 0, **gates: object
) -> GateBank:
    """Four points a layer, each with 8 units; costs differ between points, and in flops otherwise than in params."""
    groups = [
        Group(f"{i}/{j}:lora", f"{i}", f"{i}.{j}", units=8, params=40 + 8 * j, flops=50.0 - 7 * j)
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
        pressure = Pressure(bank, penalty, Schedule(warmup=0.25, ramp=0.6, prune=None), total_steps=1000)
        before = bank.log_alpha.detach().clone()
        pressure.ascend(bank)
        assert float(pressure.term(bank).detach()) == 0.0
        assert torch.equal(bank.log_alpha, before)


def test_the_target_falls_from_everything_to_the_budget() -> None:
    bank = bank_of()
    pressure = Pressure(bank, Budget(fraction=0.125), Schedule(warmup=0.2, ramp=0.6, prune=None), total_steps=1000)
    dense = bank.dense_cost()
    assert pressure.target(at(bank, 0.1)) == dense
    assert pressure.target(at(bank, 0.4)) == pytest.approx(dense * (1 + 0.125) / 2)
    assert pressure.target(at(bank, 1.0)) == pytest.approx(0.125 * dense)


def test_pruning_is_due_at_its_share_of_the_steps_and_only_once() -> None:
    bank = bank_of()
    pressure = Pressure(bank, Budget(fraction=0.5), Schedule(prune=0.65), total_steps=100)
    due = [p for p in range(100) if pressure.prune_is_due(at(bank, p / 100, 100))]
    assert due == list(range(65, 100))
    bank.fix(torch.ones(1, bank.n_units))
    assert not pressure.prune_is_due(bank)
    assert float(pressure.term(bank)) == 0.0


# -- bad budgets -------------------------------------------------------------------------------------------


def test_a_budget_below_the_smallest_unit_says_what_the_least_is() -> None:
    with pytest.raises(BudgetError, match=r"(?s)at least 40 params.*got:\s+39.*where:.*fix:"):
        Pressure(bank_of(), Budget(params=39), Schedule(), total_steps=10)
    with pytest.raises(BudgetError, match="at least 320 params"):  # whole paths are the smallest units here
        Pressure(bank_of(levels=("path",)), Budget(params=300), Schedule(), total_steps=10)


def test_a_budget_needs_the_length_of_training() -> None:
    for steps in (None, 0):
        with pytest.raises(BudgetError, match=r"(?s)total_steps.*fix:.*GatedTrainer"):
            Pressure(bank_of(), Budget(fraction=0.5), Schedule(), total_steps=steps)
