"""All gates of a model in one flat bank: one draw a step, one expected cost, one host read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


@dataclass(frozen=True, slots=True)
class Group:
    """The units of one candidate path, as the bank sees them.

    Attributes:
        key: name of the path.
        block, point: what its coarser gates are shared by.
        units: how many units (ranks, widths) it has.
        params, flops: cost of one unit.
    """

    key: str
    block: str
    point: str
    units: int
    params: float
    flops: float


def moving_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `Module._apply` is to do in place of `fn` where tensors keep their type: only the device follows."""

    def move(t: Tensor) -> Tensor:
        moved = fn(t)
        return moved if moved.dtype == t.dtype else t.to(moved.device)

    return move


class GateBank(nn.Module, StepListener):
    """Every log alpha of a model as one fp32 parameter `log_alpha` of shape (tasks, gates).

    A *unit* is the smallest thing that can be kept or dropped: one rank of a path where ranks are gated, else the whole
    path. Its gate is the product over the gated levels, `z = z_block z_point z_path z_rank` (coarse times fine, after
    CoFi, ACL 2022). `slices[key]` is where a path's units lie in vectors of length `units`.

    Only noise is ever cached, never a gate with a graph: a gate cached across checkpointed blocks raises "backward a
    second time", one sampled inside them gets wrong gradients. `take` therefore hands each path a value computed once
    per step outside the graph, with the exact derivative attached.
    """

    turn: ClassVar[Turn] = Turn.GATES
    # constants, per unit: ancestors among the gates, owner among the groups, its first unit and number of units, cost
    ancestry: Tensor
    owner: Tensor
    first: Tensor
    siblings: Tensor
    params: Tensor
    flops: Tensor
    weights: Tensor
    # the state of training
    step: Tensor
    noise: Tensor
    pulse: Tensor
    evidence: Tensor
    kept: Tensor
    fixed: Tensor
    # what `refresh` computes
    values: Tensor
    padded: Tensor
    slopes: Tensor
    open_paths: dict[str, bool]

    def __init__(self, groups: Sequence[Group], config: GateConfig, *, tasks: int, seed: int) -> None:
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
        self.register_buffer("evidence", torch.zeros(tasks, self.n_units))
        self._constant("noise", torch.zeros(tasks, self.n_gates))
        self.register_buffer("pulse", torch.zeros(tasks, self.n_units))
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
        """Begin a step: keep log alpha in range, draw this step's noise.

        Noise is a function of (seed, step) alone: all ranks draw the same, and a resumed run draws what it would have.
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
        """Clamp log alpha to its bounds: an optimiser may have stepped beyond them."""
        self.log_alpha.clamp_(*self.config.bounds)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def refresh(self) -> None:
        """Compute this step's gate values, slopes and the set of open paths, unless they are current."""
        stochastic = self.training and self.config.stochastic and not self.frozen
        current = (stochastic, self.log_alpha._version, self.kept._version, self.log_alpha.device)
        if self._values_of == current:
            return
        with torch.inference_mode(False), torch.no_grad():  # cached values outlive an inference-mode evaluation
            noise = self.noise if stochastic else None
            one = self.log_alpha.new_ones(self.tasks, 1)
            if self.frozen:
                self.values = self.kept.clone()
                self.slopes = self.padded = torch.cat([torch.zeros_like(self.log_alpha), one], 1)
            else:
                gates = hard_concrete.sample(self.log_alpha, noise, self.config)
                self.padded = torch.cat([gates, one], 1)
                self.slopes = torch.cat([hard_concrete.slope(self.log_alpha, noise, self.config), 0 * one], 1)
                self.values = self.padded[:, self.ancestry].prod(-1)
            alive = torch.zeros(len(self.groups), device=self.values.device)
            alive.index_add_(0, self.owner, self.values.amax(0))
            self.open_paths = dict(zip(self.slices, (alive > 0).tolist(), strict=True))  # the one host read
        self._values_of = current

    def take(self, key: str) -> Tensor | None:
        """Gate of path `key`'s units, shape (tasks, units or 1), differentiable in log alpha; None where all are 0."""
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.refresh()
            if not self.open_paths[key]:
                return None
        where = self.slices[key]
        values = self.values[:, where]
        if self.frozen or not torch.is_grad_enabled():
            return values
        pulse = self.pulse[:, where]
        return _take(self.log_alpha, values, self.padded, self.slopes, self.ancestry[where], pulse)

    # -- the end of the step -------------------------------------------------------------------------------------------

    def watched(self) -> Sequence[Tensor]:
        """The gates; see `StepListener`."""
        return [self.log_alpha]

    def after_step(self, optimizer: Optimizer | None) -> None:
        """End the step. Version counters could not tell that it ended: fused optimisers do not advance them."""
        if not self.frozen:
            self._collect_evidence()
        self._moved = True
        self._values_of = None

    @torch.no_grad()
    def _collect_evidence(self, decay: float = 0.95) -> None:
        # At the end of a step, not at the beginning of the next: DDP overwrites buffers before a forward pass, and a
        # checkpoint holds one rank's only.
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self.pulse)
            self.pulse /= dist.get_world_size()  # as DDP averages gradients
        self.evidence.mul_(decay).add_(self.pulse.abs().nan_to_num(0.0, 0.0, 0.0), alpha=1 - decay)
        self.pulse.zero_()

    def next_step(self) -> None:
        """Say that an optimiser has stepped. Needed only for optimisers that are no `torch.optim.Optimizer`."""
        CLOCK.stepped([self.log_alpha])

    # -- closed forms --------------------------------------------------------------------------------------------------

    def open_probability(self, log_alpha: Tensor | None = None) -> Tensor:
        """P(every ancestor open) of each unit, (tasks, units), differentiable: a product, levels being independent."""
        probability = hard_concrete.open_probability(self.log_alpha if log_alpha is None else log_alpha, self.config)
        padded = torch.cat([probability, probability.new_ones(self.tasks, 1)], 1)
        return padded[:, self.ancestry].prod(-1)

    def cost(self, unit: str) -> Tensor:
        """Cost of each unit in `params` or `flops`, float64, shape (units,), on the CPU."""
        return self.flops if unit == "flops" else self.params

    def dense_cost(self, unit: str = "params") -> float:
        """Cost of all candidates."""
        return float(self.cost(unit).sum())

    def weigh(self, weights: Tensor) -> None:
        """Let the penalty press on some units harder than their cost says: positive, shape (units,).

        Scaled so that the dense candidates cost in parameters what they did. No budget and no reported cost changes.
        """
        weights = weights.to(self.params)
        self.weights = weights * self.params.sum() / (weights * self.params).sum()

    def expected_cost(
        self, unit: str = "params", log_alpha: Tensor | None = None, *, weights: Tensor | None = None
    ) -> Tensor:
        """E[cost of what any task keeps open], a differentiable scalar: sum_u cost_u (1 - prod_t (1 - P_t(u open))).

        Of the gates as they are, or were they at `log_alpha`, shape (tasks, gates); every unit's cost times `weights`,
        shape (units,), where given.
        """
        # a product and a sum, since autocast would round a matrix product
        return (self.union(self._share_open(log_alpha)) * self._weighed(unit, weights)).sum()

    def expected_task_cost(
        self, unit: str = "params", log_alpha: Tensor | None = None, *, weights: Tensor | None = None
    ) -> Tensor:
        """E[cost of what each task keeps open], shape (tasks,); arguments as of `expected_cost`, or weights by task."""
        return (self._share_open(log_alpha) * self._weighed(unit, weights)).sum(-1)

    def place(self, values: Tensor) -> Tensor:
        """Place of each unit among those of its path by `values` (..., units): 1 for the largest, then 2, ..."""
        order = values.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, self.owner[order].argsort(dim=-1, stable=True))  # path by path, each by value
        places = torch.arange(values.shape[-1], device=values.device) - self.first + 1
        return torch.empty_like(order).scatter_(-1, order, places.expand_as(order))

    @torch.no_grad()
    def crowding(self, *, per_task: bool = False) -> Tensor:
        """Place of each unit in its path by P(open), over the mean place: (units,) of the union, or (tasks, units).

        As a weight of costs it makes a path's second unit twice as dear as its first, its third three times: where
        prices meet gains, units go to paths in proportion to their gains. At equal prices the steepest path takes all,
        since to first order its units all look equally useful: what one adds to another is not in a gradient.
        """
        probability = self.open_probability()
        places = self.place(probability if per_task else self.union(probability))
        return 2 * places.to(probability) / (self.siblings + 1)

    def _weighed(self, unit: str, weights: Tensor | None) -> Tensor:
        cost = self.cost(unit).to(self.log_alpha)
        return cost if weights is None else cost * weights.to(cost)

    def _share_open(self, log_alpha: Tensor | None) -> Tensor:
        return (self.kept > 0).to(self.log_alpha) if self.frozen else self.open_probability(log_alpha)

    @staticmethod
    def union(probability: Tensor) -> Tensor:
        """(tasks, units) to (units,): that any task has the unit open."""
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
        """From now on the gates are the constants `values` (tasks, units); log alpha no longer learns."""
        self.kept.copy_(values)
        self.fixed.fill_(True)
        self._settle()

    def _settle(self) -> None:
        self._is_fixed = bool(self.fixed)
        self.log_alpha.requires_grad_(not self._is_fixed)
        if self._is_fixed:
            self.log_alpha.grad = None
        self._values_of = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._settle()
        self._moved = True


class _Take(torch.autograd.Function):
    """Values computed outside the graph, with d(prod of ancestors)/d log alpha attached.

    Its backward also leaves each unit's first-order effect g z in `pulse` (a slice of the bank's buffer): what removing
    the unit would cost to first order, the gradient evidence that the bank smooths over steps.
    """

    @staticmethod
    def forward(
        ctx: Any, log_alpha: Tensor, values: Tensor, padded: Tensor, slopes: Tensor, ancestry: Tensor, pulse: Tensor
    ) -> Tensor:
        ctx.save_for_backward(values, padded, slopes, ancestry)
        ctx.pulse = pulse
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        values, padded, slopes, ancestry = ctx.saved_tensors
        ctx.pulse += grad * values
        factors, local = padded[:, ancestry], slopes[:, ancestry]  # (tasks, units, levels)
        total = torch.zeros_like(padded)
        for level in range(ancestry.shape[1]):
            others = torch.cat([factors[..., :level], factors[..., level + 1 :]], -1).prod(-1)
            total.index_add_(1, ancestry[:, level], grad * others * local[..., level])
        return total[:, :-1], None, None, None, None, None


_take: Callable[..., Tensor] = _Take.apply
