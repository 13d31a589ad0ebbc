"""Gates that start from evidence, are held for a while, and follow the loss as far as its evidence agrees."""

from __future__ import annotations

import copy
from contextlib import suppress

import pytest
import torch
from test_bank import GROUPS, HIERARCHIES, bank_of, everything, members

from gatedadapters.config import L0, Budget, Schedule
from gatedadapters.gates import GateBank, Pressure
from gatedadapters.gates.bank import normal_scores
from gatedadapters.structure.discretize import choose_units

WORTH = torch.tensor([[5.0, 1.0, 3.0, 0.5, 2.0, 4.0]])  # of the six units of GROUPS


def sums(bank: GateBank) -> torch.Tensor:
    """log alpha of each unit, added up over its levels and counted from the start, (tasks, units)."""
    moved = bank.log_alpha.detach() - bank.config.init
    return torch.stack([moved[:, own].sum(1) for own in members(bank)], 1)


# -- a prior ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", HIERARCHIES, ids="-".join)
def test_levels_share_out_what_the_prior_says_of_a_unit(levels: tuple[str, ...]) -> None:
    bank = bank_of(levels, prior=0.5)
    units = sums(bank).shape[1]
    worth = WORTH[:, :units]
    bank.start_from(worth)
    wanted = 0.5 * normal_scores(worth)
    own = members(bank)
    # Units of the same gates get the mean of what is said of them; with a gate for each unit nothing is lost.
    alike = torch.tensor([[float(set(a) == set(b)) for b in own] for a in own])
    torch.testing.assert_close(sums(bank), wanted @ alike / alike.sum(0))


def test_only_the_order_of_worths_counts_and_ties_stay_even() -> None:
    one, two = bank_of(), bank_of()
    one.start_from(WORTH)
    two.start_from(1e6 * WORTH**3)
    assert torch.equal(one.log_alpha, two.log_alpha)
    assert one.log_alpha.argsort().tolist() == WORTH.argsort().tolist()
    one.start_from(torch.full_like(WORTH, 7.0))
    assert torch.equal(one.log_alpha, torch.full_like(one.log_alpha, one.config.init))
    one.start_from(torch.tensor([[1.0, 1.0, 2.0, 2.0, 0.0, 3.0]]))
    low, _, high, also_high, *_ = one.log_alpha[0].tolist()
    assert low == one.log_alpha[0, 1]
    assert high == also_high > low


def test_the_best_are_told_apart_although_all_of_them_are_at_the_bound() -> None:
    bank = bank_of(prior=20.0)
    bank.start_from(WORTH)
    order = WORTH[0].argsort(descending=True).tolist()
    high = bank.config.bounds[1]
    assert sum(float(value) == pytest.approx(high) for value in bank.log_alpha[0].detach()) > 1
    assert bank.preference()[0].argsort(descending=True).tolist() == order
    best = choose_units(bank, Budget(params=int(bank.params[order[0]])))
    assert best[0].nonzero().flatten().tolist() == order[:1]


def test_tasks_have_priors_of_their_own_and_gates_stay_in_range() -> None:
    bank = bank_of(tasks=2, prior=100.0)
    bank.start_from(torch.cat([WORTH, -WORTH]))
    low, high = bank.config.bounds
    first, second = bank.log_alpha.detach()
    assert float(first.min()) == pytest.approx(low)
    assert float(second.max()) == pytest.approx(high)
    assert first[0] > first[3]
    assert second[0] < second[3]


def test_normal_scores_are_the_quantiles_of_van_der_waerden() -> None:
    expected = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor([[3.0, 1.0, 2.0]]) / 4)
    torch.testing.assert_close(normal_scores(torch.tensor([[9.0, -1.0, 0.0]])), expected)


# -- held ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [False, True])
def test_gates_that_were_held_are_as_before_also_after_an_error(fixed: bool) -> None:
    bank = bank_of()
    if fixed:
        bank.fix(torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 0.0]]))
    else:
        bank.log_alpha.grad = torch.ones_like(bank.log_alpha)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    gates = everything(bank).detach()
    kept = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0, 1.0]])
    with suppress(KeyError), bank.held(kept):
        assert torch.equal(everything(bank), kept)
        assert not bank.log_alpha.requires_grad
        assert not bank.step_is_new()  # a step of what is trained meanwhile draws nothing
        bank.after_step(None)
        raise KeyError
    assert bank.frozen == fixed
    assert bank.log_alpha.requires_grad != fixed
    assert (bank.log_alpha.grad is None) == fixed
    for name, value in bank.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(everything(bank).detach(), gates)


# -- trust -----------------------------------------------------------------------------------------------------------


def step(bank: GateBank, weights: torch.Tensor) -> torch.Tensor:
    """One step in which the loss is the weighted sum of the gates; the gradient that reached log alpha."""
    bank.log_alpha.grad = None
    bank.draw()
    (everything(bank) * weights).sum().backward()
    bank.after_step(None)
    return bank.log_alpha.grad.clone()


def test_evidence_that_agrees_keeps_the_gradient_and_evidence_that_does_not_removes_it() -> None:
    bank, plain = (bank_of(stochastic=False, init=1.5) for _ in range(2))
    bank.shrinks = True  # as under a budget
    steady, changing = torch.tensor([[1.0] * 3 + [2.0] * 3]), torch.tensor([[1.0] * 3 + [-2.0] * 3])
    first = step(bank, steady)
    assert torch.equal(first, step(plain, steady))  # nothing is known yet
    step(bank, changing)
    step(plain, changing)
    assert bank.trust[0].tolist() == [1.0] * 3 + [0.0] * 3
    found, wanted = step(bank, steady), step(plain, steady)
    torch.testing.assert_close(found[:, :3], wanted[:, :3])
    assert torch.equal(found[:, 3:], torch.zeros(1, 3))
    assert bool((wanted[:, 3:] != 0).all())


def test_trust_between_is_the_product_of_halves_by_their_mean_square() -> None:
    bank = bank_of(stochastic=False, init=0.0)
    bank.shrinks = True
    step(bank, torch.ones(1, 6))
    step(bank, torch.full((1, 6), 3.0))
    torch.testing.assert_close(bank.trust, torch.full((1, 6), 2 * 3.0 / (1 + 9)))


def test_trust_is_that_of_the_saved_halves_when_a_bank_is_loaded() -> None:
    bank, fresh = (bank_of(stochastic=False) for _ in range(2))
    bank.shrinks = fresh.shrinks = True
    for sign in (1.0, -2.0, 0.5):
        step(bank, sign * torch.arange(1.0, 7.0)[None])
    fresh.load_state_dict(copy.deepcopy(bank.state_dict()))
    assert torch.equal(fresh.trust, bank.trust)
    assert torch.equal(step(fresh, torch.ones(1, 6)), step(bank, torch.ones(1, 6)))


def test_a_bank_of_release_0_1_starts_without_evidence() -> None:
    bank = bank_of()
    state = {name: value for name, value in bank.state_dict().items() if name != "halves"}
    bank.load_state_dict(state)
    assert torch.equal(bank.trust, torch.ones(1, sum(group.units for group in GROUPS)))


def test_only_a_budget_lets_gates_heed_the_loss_less() -> None:
    for penalty, config, shrinks in (
        (Budget(fraction=0.5), True, True),
        (Budget(fraction=0.5), False, False),
        (L0(weight=1.0), True, False),
    ):
        bank = bank_of(shrink=config)
        Pressure(bank, penalty, Schedule(), total_steps=10)
        assert bank.shrinks is shrinks
