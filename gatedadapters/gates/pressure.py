"""The penalty as a differentiable number, and the Lagrangian ascent behind a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from gatedadapters.config import L0, Budget, Penalty, Schedule
from gatedadapters.errors import BudgetError
from gatedadapters.gates.bank import GateBank, moving_only


class Pressure(nn.Module):
    """Turns `L0` or `Budget` into the loss term, given how far training has come.

    A budget is held in two ways. Once a step one number is added to every log alpha, such that the expected cost is
    what it should be now: it can neither lag behind the ramp nor run past it to a dead adapter, whatever the learning
    rate and the length of training. *Which* gates pay is left to the Lagrangian term m E[cost]. Its multiplier ascends
    by the correction that was needed, m <- m exp(-shift): where costs had to be pushed down, m was too small. It counts
    in units of the gates' own gradient evidence, so the scale of the loss does not matter. Once m has faded, the
    constraint is slack, and nothing lifts what the loss itself closes. A path's later units cost more than its first
    (`GateBank.crowding`), so that the budget is shared out, not taken whole by the path with the steepest gradient.

    `multipliers` holds one m for the union over tasks and one per task for the cap.

    References:
        CoFi (ACL 2022): Lagrangian ascent on a ramped sparsity target. S3Delta (NeurIPS 2022): one shift of all log
        alpha that meets a budget.
    """

    multipliers: Tensor
    start: Tensor  # steps that the gates had made before
    _ramps: tuple[tuple[float, float] | None, tuple[float, float] | None] = (None, None)
    SMALLEST, LARGEST = 1e-2, 1e3

    def __init__(self, bank: GateBank, penalty: Penalty, schedule: Schedule, *, total_steps: int | None) -> None:
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
            self._ramps = _ramps(bank, penalty)
        self.penalty, self.schedule, self.total_steps = penalty, schedule, total_steps
        self.register_buffer("multipliers", torch.ones(1 + bank.tasks, device=bank.log_alpha.device))
        self.register_buffer("start", bank.step.detach().clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # bf16 holds no step of the ascent below 0.4 %: only the device follows, as for gates
        nn.Module._apply(self, moving_only(fn), recurse)
        return self

    def progress(self, bank: GateBank) -> float:
        """Share of training, in [0, 1], that was done when the last step began; 1 where the length of training is
        unknown.
        """
        if not self.total_steps:
            return 1.0
        return min(1.0, max(0, int(bank.step - self.start) - 1) / self.total_steps)

    def target(self, bank: GateBank) -> float:
        """Where the expected cost should be now, in units of cost.

        Anything up to dense during the warm-up; then it falls geometrically to the expected cost of a Structure that
        spends the budget, with gates at the ends of their range: what is dropped keeps the probability that log alpha's
        lower bound leaves it. The budget itself once a Structure is fixed.
        """
        assert isinstance(self.penalty, Budget)
        dense = bank.dense_cost(self.penalty.unit)
        if bank.frozen:
            return self.penalty.resolve(dense)
        return self._targets(bank)[0] if self._presses(bank) else dense

    def _targets(self, bank: GateBank) -> tuple[float, float | None]:
        """For the union over tasks and for each task alone (None without a cap)."""
        pressure = self.schedule.pressure(self.progress(bank))
        union, cap = (None if ends is None else ends[0] * (ends[1] / ends[0]) ** pressure for ends in self._ramps)
        assert union is not None
        return union, cap

    def kept_share(self, progress: float) -> float:
        """How much of what is open at `progress` the budget will keep, in (0, 1]; 1 for L0 and from the prune on."""
        at, ends = self.schedule.prune, self._ramps[0]
        if ends is None or (at is not None and progress >= at):
            return 1.0
        return float((ends[1] / ends[0]) ** (1.0 - self.schedule.pressure(progress)))

    def term(self, bank: GateBank) -> Tensor:
        """The loss term, a differentiable scalar; 0 once a Structure is fixed or before the warm-up ends."""
        terms = list(self.terms(bank).values())
        return sum(terms[1:], terms[0])

    def terms(self, bank: GateBank) -> dict[str, Tensor]:
        """What `term` is the sum of: `L0`, or `budget` and, where tasks are capped, `cap`; differentiable scalars."""
        budget = self.penalty if isinstance(self.penalty, Budget) else None
        if not self._presses(bank):
            names = ["L0"] if budget is None else ["budget", *(["cap"] if budget.per_task is not None else [])]
            return {name: bank.log_alpha.new_zeros(()) for name in names}
        unit = self.penalty.unit
        dense, pressure = bank.dense_cost(unit), self.schedule.pressure(self.progress(bank))
        if isinstance(self.penalty, L0):
            return {"L0": self.penalty.weight * pressure * bank.expected_cost(unit, weights=bank.weights) / dense}
        m = self.multipliers  # they rise by true costs, so that budgets stay exact; what they press on is weighted
        crowded = bank.crowding()
        crowded *= bank.weights.to(crowded)
        found = {"budget": m[0] * bank.evidence.sum() * bank.expected_cost(unit, weights=crowded) / dense}
        if self.penalty.per_task is not None:
            crowded = bank.crowding(per_task=True)
            crowded *= bank.weights.to(crowded)
            found["cap"] = (m[1:] * bank.evidence.sum(1)) @ bank.expected_task_cost(unit, weights=crowded) / dense
        return found

    @torch.no_grad()
    def ascend(self, bank: GateBank) -> None:
        """Once at the beginning of each optimiser step: meet the target, and take the correction as the ascent."""
        if not isinstance(self.penalty, Budget) or not self._presses(bank):
            return
        unit, (union, cap) = self.penalty.unit, self._targets(bank)
        bounds, m = bank.config.bounds, self.multipliers

        def shift(cost: Callable[[Tensor], Tensor], target: float, multiplier: Tensor) -> float:
            """What to add: never so much up that the multiplier fades below the smallest."""
            found = solve_shift(lambda b: cost((bank.log_alpha + b).clamp(*bounds)), target)
            found = min(found, math.log(float(multiplier) / self.SMALLEST))
            multiplier.mul_(math.exp(-found)).clamp_(self.SMALLEST, self.LARGEST)
            return found

        bank.log_alpha.add_(shift(lambda a: bank.expected_cost(unit, a), union, m[0])).clamp_(*bounds)
        if cap is not None:
            for task, own in enumerate(bank.log_alpha):
                down = shift(lambda a, t=task: bank.expected_task_cost(unit, a)[t], cap, m[1 + task])  # type: ignore[misc]
                own.add_(min(0.0, down)).clamp_(*bounds)

    def _presses(self, bank: GateBank) -> bool:
        return not bank.frozen and self.schedule.pressure(self.progress(bank)) > 0

    @property
    def prune_step(self) -> int | None:
        """The step, counted from 1, at whose end the Structure is fixed; None where it never is."""
        if self.schedule.prune is None or not self.total_steps:
            return None
        return max(1, math.ceil(self.schedule.prune * self.total_steps - 1e-9))  # the product may lie just above

    def prune_is_due(self, bank: GateBank) -> bool:
        """Between two steps: whether the schedule says to fix the Structure now."""
        at = self.prune_step
        if at is None or bank.frozen:
            return False
        done = int(bank.step - self.start) - (not bank.step_is_new())  # the last draw may be of a step under way
        return done >= at


def _ramps(bank: GateBank, budget: Budget) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """Expected cost at the beginning and the end of the ramp: of the union over tasks, and of each task (its cap)."""
    dense = bank.dense_cost(budget.unit)
    low, start = (torch.full_like(bank.log_alpha, value) for value in (bank.config.bounds[0], bank.config.init))

    def ends(cost: Callable[[Tensor], Tensor], goal: float) -> tuple[float, float]:
        floor = float(cost(low))
        return float(cost(start)), floor + (dense - floor) * min(1.0, goal / dense)

    with torch.no_grad():
        cap = budget.resolve_task(dense)
        return (
            ends(lambda at: bank.expected_cost(budget.unit, at), budget.resolve(dense)),
            None if cap is None else ends(lambda at: bank.expected_task_cost(budget.unit, at)[0], cap),
        )


def solve_shift(cost: Callable[[Tensor], Tensor], target: float, *, tolerance: float = 5e-3) -> float:
    """The b with cost(b) = target to a relative `tolerance`, for an increasing cost; the nearer of +-10 if none has.

    Newton steps on log cost, bisection where they leave the bracket: mostly one or two evaluations, since the gates
    move little in a step.
    """
    low, high, b = -10.0, 10.0, 0.0
    for _ in range(40):
        with torch.enable_grad():
            at = torch.tensor(b, requires_grad=True)
            value = cost(at)
            now = float(value.detach())
            error = math.log(max(now, 1e-30) / target)
            if abs(error) < tolerance:
                break
            (slope,) = torch.autograd.grad(value, at)
        low, high = (low, b) if error > 0 else (b, high)
        newton = b - error * now / max(float(slope), 1e-12)
        b = newton if low < newton < high else (low + high) / 2
    return b


def check_budget(bank: GateBank, budget: Budget) -> float:
    """The budget in units of cost.

    Raises:
        BudgetError: if it, or its cap per task, does not pay for the smallest unit.
    """
    dense, smallest = bank.dense_cost(budget.unit), float(bank.cost(budget.unit).min())
    resolved = budget.resolve(dense)
    for part, value in (("budget", resolved), ("cap per task", budget.resolve_task(dense))):
        if value is not None and value < smallest:
            raise BudgetError(
                f"the {part} is below the smallest candidate",
                expected=f"at least {smallest:,.0f} {budget.unit}",
                got=f"{value:,.0f} ({budget!r})",
                where=f"budget over {bank.n_units:,} units, {dense:,.0f} {budget.unit} when dense",
                fix=f"raise the {part}, or offer smaller candidates (gate ranks, lower widths)",
            )
    return resolved
