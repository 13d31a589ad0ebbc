"""The penalty as a loss term, and the controller that holds a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from gatedadapters.config import L0, Budget, Penalty, Schedule
from gatedadapters.errors import BudgetError, TrainingError
from gatedadapters.gates.bank import GateBank, moving_only


class Pressure(nn.Module):
    """Turns `L0` or `Budget` into the loss term, given the progress of training.

    Two mechanisms hold a budget:

    - *How much* stays open is set by a shift. Once a step the same number is added to every log alpha, so that the
      expected cost meets the target of the ramp. So the cost can neither lag behind the ramp nor fall to 0, whatever
      the learning rate and the length of training.
    - *Which* gates close is decided by the loss and the Lagrangian term m E[cost]. The multiplier follows the shift,
      m <- m exp(-shift): if the shift had to push costs down, m was too small. The term is scaled by the sum of the
      gates' saliency, so the scale of the loss does not matter. If m falls to its minimum, the constraint is slack,
      and no shift reopens what the loss closes.

    A path's later units cost more than its first (`GateBank.rank_price`); otherwise the path with the steepest gradient
    would take the whole budget.

    Attributes:
        multipliers: (1 + tasks,): m of the union over tasks, then m of each task, used if the budget caps tasks.
        start: number of steps that the gates had made before this penalty was set.
        asked_for: whether `Adapters.penalty` was called, to add the term to a loss.

    References:
        Xia, Zhong, Chen 2022 (CoFi), arXiv 2204.00408: Lagrangian ascent on a sparsity target that follows a ramp. Hu
        et al. 2022 (S3Delta), arXiv 2206.07382: one shift of all log alphas that meets a budget.
    """

    multipliers: Tensor
    start: Tensor
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
        # Under an L0 weight, which does not give way, gates that heed the loss less would just close.
        bank.shrinks = bank.config.shrink and isinstance(penalty, Budget)
        self.asked_for = False
        self.register_buffer("multipliers", torch.ones(1 + bank.tasks, device=bank.log_alpha.device))
        self.register_buffer("start", bank.step.detach().clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Multipliers stay fp32, as gates do: bf16 would round away changes below 0.4 %.
        nn.Module._apply(self, moving_only(fn), recurse)
        return self

    def progress(self, bank: GateBank) -> float:
        """Share of training done when the last step began, in [0, 1]; 1 if the length of training is unknown."""
        if not self.total_steps:
            return 1.0
        return min(1.0, max(0, int(bank.step - self.start) - 1) / self.total_steps)

    def target(self, bank: GateBank) -> float:
        """The expected cost that the gates should have now, in units of cost.

        During the warm-up it is the dense cost. Then it falls geometrically to the expected cost of a Structure that
        spends the budget. A dropped gate sits at log alpha's lower bound, where P(open) is still above 0; the final
        target allows for that. Once a Structure is fixed, it is the budget itself.
        """
        assert isinstance(self.penalty, Budget)
        dense = bank.dense_cost(self.penalty.unit)
        if bank.frozen:
            return self.penalty.resolve(dense)
        return self._targets(bank)[0] if self._presses(bank) else dense

    def _targets(self, bank: GateBank) -> tuple[float, float | None]:
        """Target of the union over tasks, and of each task (None without a cap)."""
        pressure = self.schedule.pressure(self.progress(bank))
        union, cap = (None if ends is None else ends[0] * (ends[1] / ends[0]) ** pressure for ends in self._ramps)
        assert union is not None
        return union, cap

    def kept_share(self, progress: float) -> float:
        """Final cost over the cost at `progress`, in (0, 1]; 1 for L0, and from the prune on."""
        at, ends = self.schedule.prune, self._ramps[0]
        if ends is None or (at is not None and progress >= at):
            return 1.0
        return float((ends[1] / ends[0]) ** (1.0 - self.schedule.pressure(progress)))

    def term(self, bank: GateBank) -> Tensor:
        """The loss term, a differentiable scalar; 0 during the warm-up and once a Structure is fixed."""
        terms = list(self.terms(bank).values())
        return sum(terms[1:], terms[0])

    def terms(self, bank: GateBank) -> dict[str, Tensor]:
        """The summands of `term`, differentiable scalars: `L0`, or `budget` and, if tasks are capped, `cap`."""
        budget = self.penalty if isinstance(self.penalty, Budget) else None
        if not self._presses(bank):
            names = ["L0"] if budget is None else ["budget", *(["cap"] if budget.per_task is not None else [])]
            return {name: bank.log_alpha.new_zeros(()) for name in names}
        unit = self.penalty.unit
        dense, pressure = bank.dense_cost(unit), self.schedule.pressure(self.progress(bank))
        if isinstance(self.penalty, L0):
            return {"L0": self.penalty.weight * pressure * bank.expected_cost(unit, weights=bank.weights) / dense}
        # The multipliers follow true costs, so that budgets stay exact. The term itself weights the costs.
        m, weights = self.multipliers, bank.rank_price()
        weights *= bank.weights.to(weights)
        found = {"budget": m[0] * bank.saliency.sum() * bank.expected_cost(unit, weights=weights) / dense}
        if self.penalty.per_task is not None:
            weights = bank.rank_price(per_task=True)
            weights *= bank.weights.to(weights)
            found["cap"] = (m[1:] * bank.saliency.sum(1)) @ bank.expected_task_cost(unit, weights=weights) / dense
        return found

    @torch.no_grad()
    def ascend(self, bank: GateBank) -> None:
        """Shift log alpha to meet the target, and update the multipliers; once at the beginning of each step."""
        if not isinstance(self.penalty, Budget) or not self._presses(bank):
            return
        unit, (union, cap) = self.penalty.unit, self._targets(bank)
        bounds, m = bank.config.bounds, self.multipliers

        def shift(cost: Callable[[Tensor], Tensor], target: float, multiplier: Tensor) -> float:
            """The number to add; limited upwards, where the multiplier reaches its minimum."""
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

    def check_asked_for(self, bank: GateBank) -> None:
        """Check, as a step ends, that the term was asked for at least once by the time it acts.

        Raises:
            TrainingError: the gates have been trained without the penalty.
        """
        if self.asked_for or bank.frozen:
            return
        step = int(bank.step - self.start)
        if not self._presses(bank) and (self.prune_step is None or step < self.prune_step):
            return
        if isinstance(self.penalty, L0) and not self.penalty.weight:
            return
        raise TrainingError(
            "a penalty was set, but it is in no loss: the gates learn nothing of it, and a prune would cut blindly",
            expected="loss + adapters.penalty() in every step, which ga.gated(YourTrainer) sees to",
            got=f"adapters.penalty() was not called in {step} steps",
            where=repr(self.penalty),
            fix="train with ga.gated(YourTrainer), add the term in your loop, or attach without penalty=",
        )

    @property
    def prune_step(self) -> int | None:
        """The step, counted from 1, at whose end the Structure is fixed; None if it never is."""
        if self.schedule.prune is None or not self.total_steps:
            return None
        return max(
            1, math.ceil(self.schedule.prune * self.total_steps - 1e-9)
        )  # rounding may push the product just above

    def prune_is_due(self, bank: GateBank) -> bool:
        """Whether the schedule says to fix the Structure now; asked between two steps."""
        at = self.prune_step
        if at is None or bank.frozen:
            return False
        done = int(bank.step - self.start) - (
            not bank.step_is_new()
        )  # a step under way has been drawn, but is not done
        return done >= at


def _ramps(bank: GateBank, budget: Budget) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """Expected cost at both ends of the ramp: for the union over tasks, and for each task (None without a cap)."""
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
    """Find b in [-10, 10] with cost(b) = target to a relative `tolerance`, for an increasing `cost`.

    If no such b exists, the nearer end is the result. The search takes Newton steps on log cost, and bisects if a step
    leaves the bracket. Gates move little in one step, so one or two evaluations are enough as a rule.
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
    """Return the budget in units of cost.

    Raises:
        BudgetError: the budget, or its cap per task, is below the cost of the cheapest unit.
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
