"""All gates of a model in one bank: a vector of log alphas, one noise draw a step, one expected cost.

The values are read from the device once a step, to learn which paths are closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gatedadapters.config import GateConfig
from gatedadapters.gates import hard_concrete
from gatedadapters.runtime.steps import CLOCK, StepListener, Turn

LEVELS = ("block", "point", "path", "rank")
RENAMED = {"evidence": "saliency", "pulse": "gate_gradient"}
"""Buffers that had other names in release 0.1: the old name, the new one."""
NEW = {"halves", "beyond"}
"""Buffers that release 0.1 did not have."""


@dataclass(frozen=True, slots=True)
class GateGroup:
    """The units of one candidate path, and the coarser gates they share with other paths.

    Attributes:
        key: name of the path.
        block: paths of one block share the block's gate.
        point: paths of one insertion point share the point's gate.
        units: number of units (ranks, hidden widths).
        params: parameters of one unit.
        flops: flops per token of one unit.
    """

    key: str
    block: str
    point: str
    units: int
    params: float
    flops: float


def normal_scores(values: Tensor) -> Tensor:
    """The standard normal quantiles of the ranks of `values` in each row; equal values get equal scores.

    References:
        Van der Waerden 1952: scores Phi^-1(rank / (n + 1)).
    """
    n = values.shape[-1]
    order = values.argsort(dim=-1, stable=True)
    ranks = torch.empty_like(values).scatter_(
        -1, order, torch.arange(1.0, n + 1, device=values.device).expand_as(values)
    )
    for row, own in zip(values, ranks, strict=True):
        _, inverse = row.unique(return_inverse=True)
        sums, counts = (own.new_zeros(int(inverse.max()) + 1).index_add_(0, inverse, v) for v in (own, own.new_ones(n)))
        own.copy_((sums / counts)[inverse])
    scores: Tensor = torch.special.ndtri(ranks / (n + 1))
    return scores


def moving_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap `fn`, the argument of `Module._apply`, so that tensors change their device and keep their dtype."""

    def move(t: Tensor) -> Tensor:
        moved = fn(t)
        return moved if moved.dtype == t.dtype else t.to(moved.device)

    return move


class GateBank(nn.Module, StepListener):
    """Every log alpha of a model as one fp32 parameter `log_alpha` of shape (tasks, gates).

    A *unit* is the smallest thing that can be kept or dropped: one rank of a path if ranks are gated, else the whole
    path. The gate of a unit is the product over the gated levels, `z = z_block z_point z_path z_rank` (coarse times
    fine, as in CoFi). `slices[key]` selects a path's units in vectors of length `units`.

    The bank caches noise and plain values, never a gate with a graph: a gate cached across checkpointed blocks raises
    "backward a second time", and a gate sampled inside them gets wrong gradients. So the values are computed once per
    step outside the graph, and `gate_for` attaches the exact derivative.

    References:
        Xia, Zhong, Chen 2022, "Structured Pruning Learns Compact and Accurate Models" (CoFi), arXiv 2204.00408.
    """

    turn: ClassVar[Turn] = Turn.GATES
    # Constants of each unit.
    ancestry: Tensor  # (units, levels): indices of the gates it is a product of
    owner: Tensor  # (units,): index of its group
    first: Tensor  # (units,): the first unit of its group
    siblings: Tensor  # (units,): number of units in its group
    params: Tensor  # (units,)
    flops: Tensor  # (units,)
    weights: Tensor  # (units,): see `weigh`
    # State of training.
    step: Tensor
    noise: Tensor  # (tasks, gates), of this step
    trust: Tensor  # (tasks, units): factor on the gradient that the loss sends to the gates
    gate_gradient: Tensor  # (tasks, units): gradient times gate, summed over the backward passes of this step
    saliency: Tensor  # (tasks, units): the absolute value of `gate_gradient`, smoothed over steps
    beyond: Tensor  # (tasks, units): what the bounds of log alpha cut off the prior that the gates started from
    halves: Tensor  # (2, tasks, units): sums of `gate_gradient` over odd and over even steps
    kept: Tensor  # (tasks, units): the constant gates of a fixed structure
    fixed: Tensor
    # Computed by `refresh`.
    values: Tensor  # (tasks, units): gates of the units
    slopes: Tensor  # (tasks, units, levels): derivative of each gate of a unit by its log alpha
    others: Tensor  # (tasks, units, levels): product of the unit's gates at all other levels
    open_paths: dict[str, bool]

    def __init__(self, groups: Sequence[GateGroup], config: GateConfig, *, tasks: int, seed: int) -> None:
        super().__init__()
        self.config, self.seed, self.groups = config, seed, tuple(groups)
        self.slices: dict[str, slice] = {}
        index: dict[tuple[str, ...], int] = {}
        ancestry: list[list[int]] = []
        owner, params, flops = [], [], []
        for number, group in enumerate(groups):
            split = "rank" in config.levels and group.units > 1
            count = group.units if split else 1
            names = {"block": ("block", group.block), "point": ("point", group.point), "path": ("path", group.key)}
            coarse = [index.setdefault(names[x], len(index)) for x in LEVELS[:3] if x in config.levels]
            start = len(ancestry)
            for unit in range(count):
                fine = ("rank", group.key, str(unit)) if "rank" in config.levels else None
                ancestry.append(coarse + ([index.setdefault(fine, len(index))] if fine else []))
                owner.append(number)
                params.append(group.params * (1 if split else group.units))
                flops.append(group.flops * (1 if split else group.units))
            self.slices[group.key] = slice(start, len(ancestry))
        self.n_gates, self.n_units, self.gate_names = len(index), len(ancestry), tuple(index)
        pad = self.n_gates  # a gate that is always 1, for units with fewer ancestors
        width = max(map(len, ancestry))
        self._constant("ancestry", torch.tensor([row + [pad] * (width - len(row)) for row in ancestry]))
        self._constant("owner", torch.tensor(owner))
        sizes = torch.bincount(self.owner)
        self._constant("first", (sizes.cumsum(0) - sizes)[self.owner])
        self._constant("siblings", sizes[self.owner])
        self.params = torch.tensor(params, dtype=torch.float64)  # on the CPU: some devices have no float64
        self.flops = torch.tensor(flops, dtype=torch.float64)
        self.weights = torch.ones(len(ancestry), dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        spread = config.init_spread * torch.randn(tasks, self.n_gates, generator=generator)
        self.log_alpha = nn.Parameter((config.init + spread).clamp(*config.bounds))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fixed", torch.zeros((), dtype=torch.bool))
        self.register_buffer("kept", torch.ones(tasks, self.n_units))
        self.register_buffer("saliency", torch.zeros(tasks, self.n_units))
        self.register_buffer("beyond", torch.zeros(tasks, self.n_units))
        self.register_buffer("halves", torch.zeros(2, tasks, self.n_units))
        self._constant("noise", torch.zeros(tasks, self.n_gates))
        self.register_buffer("gate_gradient", torch.zeros(tasks, self.n_units))
        self._constant("trust", torch.ones(tasks, self.n_units))
        self.shrinks = False  # a budget's pressure sets it; see `GateConfig.shrink`
        self._moved = True
        self._values_of: tuple[Any, ...] | None = None
        self._is_fixed = False
        CLOCK.add(self)

    def _constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._values_of = None
        nn.Module._apply(self, moving_only(fn), recurse)  # gates stay fp32 under model.half() or model.to(bfloat16)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
        self._values_of = None
        CLOCK.add(self)

    # -- one step ------------------------------------------------------------------------------------------------------

    @property
    def tasks(self) -> int:
        """Number of tasks, each with its own gates."""
        return self.log_alpha.shape[0]

    @property
    def frozen(self) -> bool:
        """Whether a Structure has been fixed (`fix`): gates no longer learn."""
        return self._is_fixed

    def step_is_new(self) -> bool:
        """Whether an optimiser has stepped on the gates since the last draw; gradient accumulation does not count."""
        return self._moved and not self.frozen

    @torch.no_grad()
    def draw(self) -> None:
        """Begin a step: clamp log alpha to its range and draw this step's noise.

        The noise depends on (seed, step) alone, so all processes draw the same, and a resumed run draws the noise of
        the run that was interrupted.
        """
        self.keep_in_range()
        self.step += 1
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + int(self.step)) % 2**63)
        noise = hard_concrete.logistic_noise(tuple(self.log_alpha.shape), self.config, generator)
        self.noise = noise.to(self.log_alpha.device)
        self._moved = False
        self._values_of = None

    @torch.no_grad()
    def keep_in_range(self) -> None:
        """Clamp log alpha to its bounds, which an optimiser's step may have left."""
        self.log_alpha.clamp_(*self.config.bounds)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def refresh(self) -> None:
        """Compute the gates, their slopes and the set of open paths, unless nothing changed since the last time."""
        stochastic = self.training and self.config.stochastic and not self.frozen
        current = (stochastic, self.log_alpha._version, self.kept._version, self.log_alpha.device)
        if self._values_of == current:
            return
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode would fail in later training
            noise = self.noise if stochastic else None
            one = self.log_alpha.new_ones(self.tasks, 1)
            if self.frozen:
                self.values = self.kept.clone()
                self.slopes = self.others = torch.zeros(*self.values.shape, self.ancestry.shape[1]).to(self.values)
            else:
                gates = hard_concrete.sample(self.log_alpha, noise, self.config)
                factors = torch.cat([gates, one], 1)[:, self.ancestry]  # (tasks, units, levels)
                slopes = torch.cat([hard_concrete.slope(self.log_alpha, noise, self.config), 0 * one], 1)
                self.values, self.slopes = factors.prod(-1), slopes[:, self.ancestry]
                rest = [torch.cat([factors[..., :i], factors[..., i + 1 :]], -1) for i in range(factors.shape[-1])]
                self.others = torch.stack([factor.prod(-1) for factor in rest], -1)
            alive = torch.zeros(len(self.groups), device=self.values.device)
            alive.index_add_(0, self.owner, self.values.amax(0))
            self.open_paths = dict(zip(self.slices, (alive > 0).tolist(), strict=True))  # the one host read
        self._values_of = current

    def gate_for(self, key: str) -> Tensor | None:
        """Gates of the units of path `key`, (tasks, units or 1), differentiable in log alpha; None if all are 0."""
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.refresh()
            if not self.open_paths[key]:
                return None
        where = self.slices[key]
        values = self.values[:, where]
        if self.frozen or not torch.is_grad_enabled():
            return values
        constants = (self.slopes, self.others, self.trust, self.gate_gradient)
        return _with_derivative(self.log_alpha, values, self.ancestry[where], *(held[:, where] for held in constants))

    # -- the end of the step -------------------------------------------------------------------------------------------

    def watched(self) -> Sequence[Tensor]:
        """The gates; see `StepListener`."""
        return [self.log_alpha]

    def after_step(self, optimizer: Optimizer | None) -> None:
        """End the step: update the saliency and ask for a new draw.

        The bank is told because it cannot see the step itself: fused optimisers do not advance version counters.
        """
        if not self.frozen:
            self._collect_saliency()
        self._moved = True
        self._values_of = None

    @torch.no_grad()
    def _collect_saliency(self, decay: float = 0.95) -> None:
        # This happens at the end of a step, not at the beginning of the next: before each forward pass DDP overwrites
        # the buffers of all processes with those of the first, and a checkpoint holds those of the first alone.
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.gate_gradient)
            self.gate_gradient /= dist.get_world_size()  # DDP averages gradients too
        seen = self.gate_gradient.nan_to_num(0.0, 0.0, 0.0)
        self.saliency.mul_(decay).add_(seen.abs(), alpha=1 - decay)
        self.halves[int(self.step) % 2] += seen
        self.gate_gradient.zero_()
        self._set_trust()

    @torch.no_grad()
    def _set_trust(self) -> None:
        """How far the evidence for each unit agrees between odd and even steps, in [0, 1]; 1 before there is some."""
        if not self.shrinks:
            return
        a, b = self.halves
        seen = (a != 0) & (b != 0)
        agreement = (a * b).clamp(min=0.0) / ((a * a + b * b) / 2).clamp(min=1e-30)
        self.trust = torch.where(seen, agreement, torch.ones_like(agreement))

    def next_step(self) -> None:
        """Report a step of an optimiser that is not a `torch.optim.Optimizer`; the clock sees all others itself."""
        CLOCK.stepped([self.log_alpha])

    # -- from evidence outside training --------------------------------------------------------------------------------

    @torch.no_grad()
    def start_from(self, worth: Tensor) -> None:
        """Start the gates from a prior, before training.

        The worths are replaced by normal scores (so only their order counts) times `prior`, and added to the initial
        log alpha. Each level takes the mean over its units, and the next level what is left: a block whose paths are
        all useful opens as a whole. What the bounds cut off counts again when units are chosen (`preference`): among
        thousands of candidates the few that a budget pays for would else be equal.

        Args:
            worth: (tasks, units), larger is more useful for its cost.
        """
        log_alpha = torch.full_like(self.log_alpha, self.config.init)
        rest = self.config.prior * normal_scores(worth.to(log_alpha))
        for level in range(self.ancestry.shape[1]):
            gate = self.ancestry[:, level]
            sums = torch.zeros(self.tasks, self.n_gates + 1, device=log_alpha.device)
            counts = torch.zeros(self.n_gates + 1, device=log_alpha.device)
            sums.index_add_(1, gate, rest)
            counts.index_add_(0, gate, torch.ones_like(rest[0]))
            means = sums / counts.clamp(min=1)
            means[:, -1] = 0.0  # the gate that is always 1
            log_alpha += means[:, :-1]
            rest = rest - means[:, gate]
        self.log_alpha.copy_(log_alpha.clamp(*self.config.bounds))
        cut = torch.cat([log_alpha - self.log_alpha, log_alpha.new_zeros(self.tasks, 1)], 1)
        self.beyond.copy_(cut[:, self.ancestry].sum(-1))

    @contextmanager
    def held(self, kept: Tensor) -> Iterator[None]:
        """A context in which the gates are the constants `kept`, (tasks, units), and do not learn."""
        before, was_fixed = self.kept.clone(), bool(self.fixed)
        grad = self.log_alpha.grad
        self.fix(kept)
        try:
            yield
        finally:
            self.kept.copy_(before)
            self.fixed.fill_(was_fixed)
            self._apply_fixed()
            self.log_alpha.grad = grad

    # -- closed forms --------------------------------------------------------------------------------------------------

    def open_probability(self, log_alpha: Tensor | None = None) -> Tensor:
        """P(open) of each unit, (tasks, units), differentiable: the product over its levels, which are independent."""
        probability = hard_concrete.open_probability(self.log_alpha if log_alpha is None else log_alpha, self.config)
        padded = torch.cat([probability, probability.new_ones(self.tasks, 1)], 1)
        return padded[:, self.ancestry].prod(-1)

    def preference(self) -> Tensor:
        """P(open) of each unit, (tasks, units), had log alpha no bounds when the prior was set."""
        probability = self.open_probability()
        return torch.where(self.beyond == 0, probability, (probability.logit(eps=1e-7) + self.beyond).sigmoid())

    def cost(self, unit: str) -> Tensor:
        """Cost of each unit in `params` or `flops`, float64, shape (units,), on the CPU."""
        return self.flops if unit == "flops" else self.params

    def dense_cost(self, unit: str = "params") -> float:
        """Cost of all candidates."""
        return float(self.cost(unit).sum())

    def weigh(self, weights: Tensor) -> None:
        """Multiply the cost of each unit in the penalty by `weights`, positive, shape (units,).

        The weights are scaled so that the dense candidates cost as many parameters as before. Budgets and reported
        costs do not change.
        """
        weights = weights.to(self.params)
        self.weights = weights * self.params.sum() / (weights * self.params).sum()

    def expected_cost(
        self, unit: str = "params", log_alpha: Tensor | None = None, *, weights: Tensor | None = None
    ) -> Tensor:
        """Expected cost of the units that any task keeps open: sum_u cost_u (1 - prod_t (1 - P_t(u open))).

        Args:
            unit: `params` or `flops`.
            log_alpha: (tasks, gates); default: the bank's own.
            weights: factor on each unit's cost, (units,); default: none.

        Returns:
            A differentiable scalar.
        """
        # A product and a sum: autocast would round the result of a matrix product.
        return (self.union(self._share_open(log_alpha)) * self._weighed(unit, weights)).sum()

    def expected_task_cost(
        self, unit: str = "params", log_alpha: Tensor | None = None, *, weights: Tensor | None = None
    ) -> Tensor:
        """Expected cost of the units that each task keeps open, (tasks,), differentiable.

        The arguments are those of `expected_cost`; `weights` may also differ by task, (tasks, units).
        """
        return (self._share_open(log_alpha) * self._weighed(unit, weights)).sum(-1)

    def rank_within_path(self, values: Tensor) -> Tensor:
        """Rank of each unit within its path by `values`, both (..., units): 1 for the largest value, then 2, ..."""
        order = values.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, self.owner[order].argsort(dim=-1, stable=True))  # path by path, each by value
        numbers = torch.arange(values.shape[-1], device=values.device) - self.first + 1
        return torch.empty_like(order).scatter_(-1, order, numbers.expand_as(order))

    @torch.no_grad()
    def rank_price(self, *, per_task: bool = False) -> Tensor:
        """Factor on the cost of each unit that grows with its rank within its path; 1 on average over a path.

        It prices a path's k-th unit k times its first, so units go to paths in proportion to their gains. At equal
        prices the path with the steepest gradient would take the whole budget, because first-order gradients ignore
        redundancy: all units of a path look equally useful.

        Args:
            per_task: rank the units by each task's P(open); default: by that of the union over tasks.

        Returns:
            (tasks, units) with `per_task`, else (units,).
        """
        probability = self.open_probability()
        ranks = self.rank_within_path(probability if per_task else self.union(probability))
        return 2 * ranks.to(probability) / (self.siblings + 1)

    def _weighed(self, unit: str, weights: Tensor | None) -> Tensor:
        cost = self.cost(unit).to(self.log_alpha)
        return cost if weights is None else cost * weights.to(cost)

    def _share_open(self, log_alpha: Tensor | None) -> Tensor:
        return (self.kept > 0).to(self.log_alpha) if self.frozen else self.open_probability(log_alpha)

    @staticmethod
    def union(probability: Tensor) -> Tensor:
        """P(any task has the unit open), (units,), from that of each task, (tasks, units)."""
        return probability[0] if len(probability) == 1 else 1 - (1 - probability).prod(0)

    @torch.no_grad()
    def deterministic(self) -> Tensor:
        """Test-time gate of each unit, shape (tasks, units)."""
        if self.frozen:
            return self.kept.clone()
        gates = hard_concrete.sample(self.log_alpha, None, self.config)
        return torch.cat([gates, gates.new_ones(self.tasks, 1)], 1)[:, self.ancestry].prod(-1)

    @torch.no_grad()
    def fix(self, values: Tensor) -> None:
        """Replace the gates by the constants `values`, (tasks, units); log alpha no longer learns."""
        self.kept.copy_(values)
        self.fixed.fill_(True)
        self._apply_fixed()

    def _apply_fixed(self) -> None:
        self._is_fixed = bool(self.fixed)
        self.log_alpha.requires_grad_(not self._is_fixed)
        if self._is_fixed:
            self.log_alpha.grad = None
        self._values_of = None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for old, new in RENAMED.items():
            if f"{prefix}{old}" in state_dict:
                state_dict[f"{prefix}{new}"] = state_dict.pop(f"{prefix}{old}")
        for name in NEW:
            state_dict.setdefault(f"{prefix}{name}", torch.zeros_like(self.get_buffer(name)))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._apply_fixed()
        self._set_trust()
        self._moved = True


def current_key(key: str) -> str:
    """The present name of a bank's entry in a state dict, from the name that any release gave it."""
    owner, dot, name = key.rpartition(".")
    return f"{owner}{dot}{RENAMED.get(name, name)}"


def is_new(key: str) -> bool:
    """Whether checkpoints of release 0.1 lack this entry of a state dict, which then starts at zero."""
    return key.rpartition(".")[2] in NEW


class _WithDerivative(torch.autograd.Function):
    """Attaches d(product of gates)/d log alpha to values that were computed outside the graph.

    The backward pass also adds gradient times gate of each unit to `gate_gradient`, a slice of the bank's buffer: the
    first-order change of the loss if the unit were removed. The bank smooths it into the saliency.
    """

    @staticmethod
    def forward(
        ctx: Any,
        log_alpha: Tensor,
        values: Tensor,
        ancestry: Tensor,
        slopes: Tensor,
        others: Tensor,
        trust: Tensor,
        gate_gradient: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(values, ancestry, slopes, others, trust)
        ctx.gate_gradient, ctx.shape = gate_gradient, log_alpha.shape
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        values, ancestry, slopes, others, trust = ctx.saved_tensors
        ctx.gate_gradient += grad * values
        by_level = (grad * trust)[..., None] * others * slopes  # (tasks, units, levels)
        tasks, gates = ctx.shape
        total = grad.new_zeros(tasks, gates + 1)  # the last is the gate that is always 1
        total.index_add_(1, ancestry.flatten(), by_level.flatten(1))
        return total[:, :-1], None, None, None, None, None, None


_with_derivative: Callable[..., Tensor] = _WithDerivative.apply
