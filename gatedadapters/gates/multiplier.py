"""The penalty as a differentiable number, and the Lagrangian ascent behind a budget."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gatedadapters.config import L0, Budget, Penalty, Schedule
from gatedadapters.errors import BudgetError
from gatedadapters.gates.bank import GateBank


class Pressure(nn.Module):
    """Turns `L0` or `Budget` into the loss term, given how far training has come.

    A budget is an inequality constraint c = (E[cost] - target) / dense <= 0 under a multiplier m that ascends,
    m <- max(0, m + rho c), once a step (augmented Lagrangian). Plain ascent winds m up while the gates are still on
    their way and then drives them far below the target, on little data down to a dead adapter. So the pressure
    max(0, m + rho c) fades out, and m with it, as the cost falls from the target to `slack` (a share of it) below.
    `multipliers` holds one m for the union over tasks and one per task for the cap.

    References:
        Nocedal & Wright, Numerical Optimization, section 17.4, for the inequality form; CoFi (ACL 2022) for Lagrangian
        ascent on a ramped sparsity target.
    """

    multipliers: Tensor

    def __init__(
        self,
        bank: GateBank,
        penalty: Penalty,
        schedule: Schedule,
        *,
        total_steps: int | None,
        rho: float = 10.0,
        slack: float = 0.05,
    ) -> None:
        super().__init__()
        if isinstance(penalty, Budget):
            if not total_steps:
                raise BudgetError(
                    "a budget is approached over training, so its length must be known",
                    expected="total_steps > 0",
                    got=repr(total_steps),
                    where="set_penalty",
                    fix="pass total_steps=, or train with GatedTrainer, which knows it",
                )
            check_budget(bank, penalty)
        self.penalty, self.schedule, self.total_steps = penalty, schedule, total_steps
        self.rho, self.slack = rho, slack
        self.register_buffer("multipliers", torch.zeros(1 + bank.tasks, device=bank.log_alpha.device))

    def progress(self, bank: GateBank) -> float:
        """Share of training done, in [0, 1]; 1 where the length of training is unknown."""
        if not self.total_steps:
            return 1.0
        return min(1.0, (int(bank.step) - 1) / self.total_steps) if int(bank.step) else 0.0

    def target(self, bank: GateBank) -> float:
        """Where the expected cost should be now, in units of cost; falls linearly from dense to the budget."""
        assert isinstance(self.penalty, Budget)
        dense = bank.dense_cost(self.penalty.unit)
        pressure = self.schedule.pressure(self.progress(bank))
        return dense + pressure * (self.penalty.resolve(dense) - dense)

    def _violations(self, bank: GateBank, *, weighted: bool = False) -> Tensor:
        """Violations c of the union and of each task, shape (1 + tasks,), differentiable; see `GateBank.weigh`."""
        assert isinstance(self.penalty, Budget)
        unit = self.penalty.unit
        dense = bank.dense_cost(unit)
        union = (bank.expected_cost(unit, weighted=weighted) - self.target(bank)) / dense
        cap = self.penalty.resolve_task(dense)
        if cap is None:
            return torch.cat([union[None], union.new_full((bank.tasks,), -1.0)])
        ramped = dense + self.schedule.pressure(self.progress(bank)) * (cap - dense)
        return torch.cat([union[None], (bank.expected_task_cost(unit, weighted=weighted) - ramped) / dense])

    def term(self, bank: GateBank) -> Tensor:
        """The loss term, a differentiable scalar; 0 once a Structure is fixed or before the warm-up ends."""
        if bank.frozen or self.schedule.pressure(self.progress(bank)) == 0:
            return bank.log_alpha.new_zeros(())
        if isinstance(self.penalty, L0):
            share = bank.expected_cost(self.penalty.unit, weighted=True) / bank.dense_cost(self.penalty.unit)
            return self.penalty.weight * self.schedule.pressure(self.progress(bank)) * share
        pressures = self._pressures(
            bank, self._violations(bank).detach()
        )  # how hard, by true costs: budgets stay exact
        return (pressures * self._violations(bank, weighted=True)).sum()  # on what, by weighted ones

    def _pressures(self, bank: GateBank, violations: Tensor) -> Tensor:
        """How hard each constraint presses now, shape (1 + tasks,)."""
        assert isinstance(self.penalty, Budget)
        band = self.slack * self.target(bank) / bank.dense_cost(self.penalty.unit)
        fade = (1 + violations / band).clamp(0, 1)
        return (self.multipliers + self.rho * violations).clamp(min=0) * fade

    @torch.no_grad()
    def ascend(self, bank: GateBank) -> None:
        """One step of ascent, at the beginning of each optimiser step."""
        if isinstance(self.penalty, Budget) and not bank.frozen and self.schedule.pressure(self.progress(bank)) > 0:
            self.multipliers.copy_(self._pressures(bank, self._violations(bank)))

    def prune_is_due(self, bank: GateBank) -> bool:
        """Whether the schedule says to fix the Structure now."""
        at = self.schedule.prune
        return bool(at is not None and self.total_steps and not bank.frozen and self.progress(bank) >= at)


def check_budget(bank: GateBank, budget: Budget) -> float:
    """The budget in units of cost.

    Raises:
        BudgetError: if it does not pay for the smallest unit.
    """
    dense = bank.dense_cost(budget.unit)
    resolved, smallest = budget.resolve(dense), float(bank.cost(budget.unit).min())
    if resolved < smallest:
        raise BudgetError(
            "the budget is below the smallest candidate",
            expected=f"at least {smallest:,.0f} {budget.unit}",
            got=f"{resolved:,.0f} ({budget!r})",
            where=f"budget over {bank.n_units:,} units, {dense:,.0f} {budget.unit} when dense",
            fix="raise the budget, or offer smaller candidates (gate ranks, lower widths)",
        )
    return resolved
