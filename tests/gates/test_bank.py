"""The gate bank: one draw a step, exact gradients, expected costs that brute force confirms."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from gatedadapters.config import GateConfig
from gatedadapters.gates import GateBank, GateGroup

HIERARCHIES = [
    ("rank",),
    ("path",),
    ("block", "rank"),
    ("point", "path"),
    ("block", "point", "path", "rank"),
]
LEVELS = pytest.mark.parametrize("levels", HIERARCHIES, ids="-".join)

# two blocks; a point with two paths; a path kept whole (units 1) beside one with three ranks
GROUPS = (
    GateGroup("b0/q:lora", "b0", "b0.q", units=3, params=10, flops=7),
    GateGroup("b0/q:scale", "b0", "b0.q", units=1, params=4, flops=50),
    GateGroup("b1/o:lora", "b1", "b1.o", units=2, params=6, flops=11),
)


def bank_of(
    levels: Sequence[str] = ("rank",),
    *,
    tasks: int = 1,
    seed: int = 0,
    groups: Sequence[GateGroup] = GROUPS,
    **gates: object,
) -> GateBank:
    config = GateConfig.parse({"levels": levels, **gates}, where="test")
    return GateBank(groups, config, tasks=tasks, seed=seed)


def scatter(bank: GateBank, spread: float = 1.5, seed: int = 0) -> GateBank:
    """Gates all over their range."""
    with torch.no_grad():
        bank.log_alpha.normal_(std=spread, generator=torch.Generator().manual_seed(seed))
    return bank


def members(bank: GateBank) -> list[list[int]]:
    """For each unit, the gates it multiplies, worked out from the names of the gates."""
    index = {name: i for i, name in enumerate(bank.gate_names)}
    levels = bank.config.levels
    units = []
    for group in GROUPS:
        split = group.units if "rank" in levels else 1
        for rank in range(split):
            names = {
                "block": ("block", group.block),
                "point": ("point", group.point),
                "path": ("path", group.key),
                "rank": ("rank", group.key, str(rank)),
            }
            units.append([index[names[level]] for level in levels])
    return units


def costs(bank: GateBank, unit: str) -> list[float]:
    found = []
    for group in GROUPS:
        each = group.params if unit == "params" else group.flops
        found += [each] * group.units if "rank" in bank.config.levels else [each * group.units]
    return found


def published(log_alpha: Tensor, noise: Tensor | None, config: GateConfig) -> Tensor:
    """Equations 10 and 13 of Louizos et al., differentiable."""
    s = torch.sigmoid(log_alpha if noise is None else (noise + log_alpha) / config.temperature)
    return (s * (config.high - config.low) + config.low).clamp(0, 1)


def everything(bank: GateBank) -> Tensor:
    """The gates of all units as the paths take them; a closed path gives zeros."""
    taken = []
    for group in GROUPS:
        gate = bank.gate_for(group.key)
        width = bank.slices[group.key].stop - bank.slices[group.key].start
        taken.append(torch.zeros(bank.tasks, width) if gate is None else gate)
    return torch.cat(taken, 1)


# -- values and gradients ----------------------------------------------------------------------------------


@LEVELS
@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("mode", ["stochastic", "deterministic"])
def test_gates_and_their_gradient_equal_autograd_through_the_products(
    levels: tuple[str, ...], tasks: int, mode: str
) -> None:
    for seed in range(6):
        bank = scatter(bank_of(levels, tasks=tasks, stochastic=mode == "stochastic", seed=seed), seed=seed)
        bank.draw()
        exact = bank.log_alpha.detach().double().requires_grad_()
        gates = published(exact, bank.noise.double() if mode == "stochastic" else None, bank.config)
        expected = torch.stack([gates[:, own].prod(-1) for own in members(bank)], 1)
        ours = everything(bank)
        torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=1e-6)
        weight = torch.randn(expected.shape, dtype=torch.float64)
        (expected_gradient,) = torch.autograd.grad((expected * weight).sum(), exact)
        if ours.requires_grad:
            (ours * weight.float()).sum().backward()
        gradient = torch.zeros_like(bank.log_alpha) if bank.log_alpha.grad is None else bank.log_alpha.grad
        torch.testing.assert_close(gradient, expected_gradient.float(), rtol=1e-4, atol=1e-6)


def test_a_closed_ancestor_leaves_exactly_no_gradient_below_it() -> None:
    bank = bank_of(("block", "rank"), stochastic=False)
    with torch.no_grad():
        bank.log_alpha.zero_()
        bank.log_alpha[0, bank.gate_names.index(("block", "b0"))] = -4.0
    everything(bank).sum().backward()
    gradient = dict(zip(bank.gate_names, bank.log_alpha.grad[0].tolist(), strict=True))
    for name, value in gradient.items():
        assert (value == 0) == ("b0" in name[1]), name


def test_a_path_whose_gates_are_all_zero_is_reported_as_closed() -> None:
    bank = bank_of(tasks=2, stochastic=False)
    where = bank.slices["b0/q:lora"]
    with torch.no_grad():
        bank.log_alpha[:, where] = -4.0
    assert bank.gate_for("b0/q:lora") is None
    assert bank.gate_for("b1/o:lora") is not None
    with torch.no_grad():
        bank.log_alpha[1, where.start] = 0.0  # one rank of one task is enough
    gate = bank.gate_for("b0/q:lora")
    assert gate is not None
    assert gate.count_nonzero() == 1


def test_evaluation_gates_are_deterministic_and_change_with_the_parameters() -> None:
    bank = scatter(bank_of(("block", "rank"))).eval()
    with torch.no_grad():
        first, second = everything(bank), everything(bank)
        assert torch.equal(first, second)
        assert torch.equal(first, bank.deterministic())
        bank.log_alpha.add_(0.5)
        assert not torch.equal(everything(bank), first)


# -- expected cost -----------------------------------------------------------------------------------------


def brute_force(bank: GateBank, unit: str, probability: Tensor) -> tuple[Tensor, Tensor]:
    """E[cost of the union over tasks] and E[cost of each task], as a sum over all states of the gates."""
    states = torch.tensor(list(itertools.product((False, True), repeat=probability.numel())))
    states = states.view(-1, *probability.shape)  # (states, tasks, gates)
    weight = torch.where(states, probability, 1 - probability).flatten(1).prod(1)
    is_open = torch.stack([states[..., gates].all(-1) for gates in members(bank)], -1)
    price = torch.tensor(costs(bank, unit), dtype=probability.dtype)
    return weight @ (is_open.any(1) * price).sum(-1), weight @ (is_open * price).sum(-1)


@LEVELS
@pytest.mark.parametrize("unit", ["params", "flops"])
def test_expected_cost_equals_enumeration_of_all_states(levels: tuple[str, ...], unit: str) -> None:
    bank = scatter(bank_of(levels))
    exact = bank.log_alpha.detach().double().requires_grad_()
    probability = torch.sigmoid(exact - 2 / 3 * math.log(0.1 / 1.1))
    union, each = brute_force(bank, unit, probability)
    cost = bank.expected_cost(unit)
    torch.testing.assert_close(cost.double(), union, rtol=1e-5, atol=0)
    torch.testing.assert_close(bank.expected_task_cost(unit).double(), each, rtol=1e-5, atol=0)
    (expected,) = torch.autograd.grad(union, exact)
    cost.backward()
    torch.testing.assert_close(bank.log_alpha.grad.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("levels", [("rank",), ("point", "path")], ids="-".join)
def test_expected_cost_of_several_tasks_is_that_of_their_union(levels: tuple[str, ...]) -> None:
    bank = scatter(bank_of(levels, tasks=2))
    probability = torch.sigmoid(bank.log_alpha.detach().double() - 2 / 3 * math.log(0.1 / 1.1))
    union, each = brute_force(bank, "params", probability)
    torch.testing.assert_close(bank.expected_cost().double(), union, rtol=1e-5, atol=0)
    torch.testing.assert_close(bank.expected_task_cost().double(), each, rtol=1e-5, atol=0)
    assert each.max() < union < each.sum()


def test_expected_cost_equals_the_mean_over_sampled_gates() -> None:
    bank = scatter(bank_of(("block", "point", "path", "rank"), tasks=3))
    n = 4000
    open_cost = []
    for _ in range(n):
        bank.draw()
        bank.refresh()
        open_cost.append(float(((bank.values > 0).any(0) * bank.cost("params")).sum()))
    samples = torch.tensor(open_cost)
    error = float(samples.std()) / math.sqrt(n)
    assert float(bank.expected_cost().detach()) == pytest.approx(float(samples.mean()), abs=4 * error)


def test_costs_of_units_add_up_to_the_candidates_whatever_is_gated() -> None:
    for levels in HIERARCHIES:
        bank = bank_of(levels)
        assert bank.dense_cost("params") == 3 * 10 + 4 + 2 * 6
        assert bank.dense_cost("flops") == 3 * 7 + 50 + 2 * 11


# -- one draw a step ---------------------------------------------------------------------------------------


def steps(bank: GateBank, optimizer: torch.optim.Optimizer, n: int) -> list[Tensor]:
    """Noise of `n` training steps."""
    drawn = []
    for _ in range(n):
        if bank.step_is_new():
            bank.draw()
        drawn.append(bank.noise.clone())
        (everything(bank) * torch.arange(bank.n_units)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return drawn


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimiser_step_begins_a_new_draw_and_the_gates_follow_the_parameters(name: str) -> None:
    bank = bank_of()
    optimizer = OPTIMIZERS[name](bank.parameters())
    drawn = steps(bank, optimizer, 3)
    assert int(bank.step) == 3
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    bank.eval()
    assert torch.equal(everything(bank).detach(), bank.deterministic())


def test_only_an_optimiser_of_the_gates_begins_a_new_draw() -> None:
    bank, other = bank_of(), torch.nn.Parameter(torch.ones(()))
    bank.draw()
    other.sum().backward()
    torch.optim.SGD([other], lr=0.1).step()
    assert not bank.step_is_new()


def test_noise_is_a_function_of_seed_and_step() -> None:
    a, b = bank_of(seed=3), bank_of(seed=3)
    noise_a = steps(a, torch.optim.SGD(a.parameters(), lr=0.1), 4)
    torch.manual_seed(99)
    torch.rand(7)  # the global random state plays no part
    noise_b = steps(b, torch.optim.Adam(b.parameters(), lr=0.5), 4)
    assert all(map(torch.equal, noise_a, noise_b))
    other = bank_of(seed=4)
    other.draw()
    assert not torch.equal(other.noise, noise_a[0])


def test_drawing_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    bank_of().draw()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_draw_brings_log_alpha_back_into_its_range() -> None:
    bank = bank_of()
    with torch.no_grad():
        bank.log_alpha[0, 0], bank.log_alpha[0, 1] = 50.0, -50.0
    bank.draw()
    torch.testing.assert_close(bank.log_alpha[0, :2].detach(), torch.tensor([math.log(1e2), math.log(1e-2)]))


@pytest.mark.parametrize("how", ["state dict", "pickle", "deep copy"])
def test_a_resumed_bank_continues_with_the_same_noise_gates_and_saliency(how: str) -> None:
    bank = bank_of(("block", "rank"))
    steps(bank, torch.optim.SGD(bank.parameters(), lr=0.1), 3)
    if how == "state dict":
        resumed = bank_of(("block", "rank"))
        resumed.load_state_dict(copy.deepcopy(bank.state_dict()))
    elif how == "pickle":
        buffer = io.BytesIO()
        torch.save(bank, buffer)
        buffer.seek(0)
        resumed = torch.load(buffer, weights_only=False)
    else:
        resumed = copy.deepcopy(bank)
    continued = [steps(b, torch.optim.SGD(b.parameters(), lr=0.1), 3) for b in (bank, resumed)]
    assert all(map(torch.equal, *continued))
    for name, value in bank.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_deep_copy_in_the_middle_of_a_step_keeps_the_noise_of_that_step() -> None:
    bank = bank_of()
    bank.draw()
    twin = copy.deepcopy(bank)
    assert not twin.step_is_new()
    assert torch.equal(everything(twin), everything(bank))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_gates_stay_float32_when_the_model_changes_its_type(dtype: torch.dtype) -> None:
    bank = scatter(bank_of())
    bank.draw()
    before = everything(bank).detach().clone()
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), bank).to(dtype)
    assert model[0].weight.dtype == dtype
    assert bank.log_alpha.dtype == bank.noise.dtype == torch.float32
    assert bank.params.dtype == torch.float64
    assert torch.equal(everything(bank), before)


def test_gates_move_to_devices_that_have_no_float64() -> None:
    def moved(tensor: Tensor) -> Tensor:
        assert tensor.dtype != torch.float64, "Apple's devices refuse it"
        return tensor.clone()

    bank = scatter(bank_of())
    cost = bank.expected_cost()
    bank._apply(moved)
    assert torch.equal(bank.expected_cost(), cost)
    assert bank.dense_cost() == float(bank.params.sum())


def test_gates_first_evaluated_in_inference_mode_can_still_be_trained() -> None:
    for fixed in (False, True):
        bank = scatter(bank_of(stochastic=False))
        if fixed:
            bank.fix(torch.full((1, bank.n_units), 0.5))
        with torch.inference_mode():
            everything(bank)
        weight = torch.ones(bank.n_units, requires_grad=True)
        (everything(bank) * weight).sum().backward()
        assert weight.grad is not None


# -- saliency ----------------------------------------------------------------------------------------------


def test_saliency_is_the_smoothed_size_of_gradient_times_gate() -> None:
    bank = scatter(bank_of(("block", "rank"), tasks=2))
    optimizer = torch.optim.SGD(bank.parameters(), lr=0.1)
    expected = torch.zeros(2, bank.n_units)
    for step in range(3):
        bank.draw()
        torch.testing.assert_close(bank.saliency, expected, rtol=1e-5, atol=1e-7)
        weights = [torch.randn(2, bank.n_units, generator=torch.Generator().manual_seed(step + m)) for m in (0, 9)]
        for weight in weights:  # two micro-batches
            (everything(bank) * weight).sum().backward()
        expected = 0.95 * expected + 0.05 * ((weights[0] + weights[1]) * everything(bank)).detach().abs()
        optimizer.step()
        optimizer.zero_grad()


# -- a fixed structure -------------------------------------------------------------------------------------


def test_fixed_gates_are_constants_that_no_longer_learn_or_draw() -> None:
    bank = scatter(bank_of())
    bank.draw()
    (everything(bank) ** 2).sum().backward()
    values = torch.tensor([[1.0, 0.0, 0.5, 1.0, 0.0, 0.0]])
    bank.fix(values)
    assert bank.frozen
    assert bank.log_alpha.grad is None
    assert not bank.log_alpha.requires_grad
    for mode in (True, False):
        bank.train(mode)
        assert torch.equal(everything(bank), values)
    assert bank.gate_for("b1/o:lora") is None
    assert not bank.step_is_new()
    assert float(bank.expected_cost()) == 10 + 10 + 4
    loaded = bank_of()
    loaded.load_state_dict(bank.state_dict())
    assert loaded.frozen
    assert torch.equal(everything(loaded), values)


# -- places in a path ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 3])
def test_places_number_the_units_of_each_path_from_the_largest_down(tasks: int) -> None:
    bank = scatter(bank_of(tasks=tasks))
    values = bank.open_probability().detach()
    places = bank.rank_within_path(values)
    for task in range(tasks):
        for where in bank.slices.values():
            own = values[task, where].tolist()
            assert places[task, where].tolist() == [1 + sum(other > value for other in own) for value in own]
    torch.testing.assert_close(places[0], bank.rank_within_path(values[0]))


def test_rank_price_is_one_on_average_over_each_path() -> None:
    bank = scatter(bank_of(tasks=2))
    for weights in (bank.rank_price(), *bank.rank_price(per_task=True)):
        for where in bank.slices.values():
            assert float(weights[where].mean()) == pytest.approx(1.0)
