"""What a budget promises: never above it, nearly used up, and a search that is alive when it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import SOON, SPACE, arguments, gated_causal, gated_classifier, labelled
from transformers import TrainerCallback

import gatedadapters as ga
from gatedadapters.errors import BudgetError, TrainingError

CLASSES = {"a": 3, "b": 2}
LATE = ga.Schedule(warmup=0.25, ramp=0.6, prune=0.65)


class AtTheCut(TrainerCallback):
    """Keeps what the gates say at the end of each step, the last being the one before the prune."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """Expected cost as a share of dense, share of units whose test-time gate is open, target as a share."""
        adapters = ga.get_adapters(model)
        bank, pressure = adapters.bank, adapters.pressure
        if not bank.frozen:
            unit = pressure.penalty.unit
            expected = float(bank.expected_cost(unit).detach()) / bank.dense_cost(unit)
            target = pressure.target(bank) / bank.dense_cost(unit) if isinstance(pressure.penalty, ga.Budget) else 0.0
            self.steps.append((expected, float((bank.deterministic() > 0).float().mean()), target))


def search(folder: Path, penalty: Any, *, model: Any = None, examples: int = 40, **changes: Any) -> Any:
    """A search of a few dozen steps; the adapters and what the cut saw."""
    options = {"schedule": changes.pop("schedule", LATE), "gate_learning_rate": changes.pop("rate", None)}
    model = model or gated_classifier()
    cut = AtTheCut()
    adapters = ga.get_adapters(model)
    several = len(adapters.tasks) > 1
    data = labelled([examples // 2] * 2, [3, 2]) if several else labelled([examples])
    args = arguments(folder, **({"max_steps": 40, "logging_steps": 40} | changes))
    trainer = ga.GatedTrainer(model, args, train_dataset=data, penalty=penalty, callbacks=[cut], **options)
    trainer.train()
    return adapters, cut.steps


def full(unit: str) -> float:
    return float(ga.get_adapters(gated_classifier()).bank.dense_cost(unit))


BUDGETS: dict[str, Any] = {
    "share": ga.Budget(fraction=0.25),
    "small share": ga.Budget(fraction=0.06),
    "parameters": ga.Budget(params=1000),
    "flops": ga.Budget(flops=4000.0),
}


@pytest.mark.parametrize("name", BUDGETS)
def test_the_structure_is_within_the_budget_and_nearly_uses_it_up(name: str, tmp_path: Path) -> None:
    budget = BUDGETS[name]
    adapters, _ = search(tmp_path, budget)
    structure = adapters.structure
    limit = budget.resolve(full(budget.unit))
    used = structure.flops if budget.unit == "flops" else structure.params
    smallest = float(adapters.bank.cost(budget.unit).min())
    assert limit - max(smallest, 0.02 * limit) < used <= limit
    adapters.compact()
    assert sum(p.numel() for p in adapters.paths.parameters()) == structure.params


@pytest.mark.parametrize("share", [0.5, 0.125])
def test_the_search_arrives_at_the_budget_alive(share: float, tmp_path: Path) -> None:
    """On a handful of examples seen over and over, where a multiplier that winds up closes everything."""
    _, steps = search(tmp_path, ga.Budget(fraction=share), examples=8, max_steps=200)
    expected, is_open, target = steps[-1]
    assert target == pytest.approx(share, abs=0.05)
    assert expected == pytest.approx(share, rel=0.5)
    assert is_open > 0.5 * share
    assert min(is_open for _, is_open, _ in steps) > 0


def test_nothing_presses_before_the_warm_up_ends(tmp_path: Path) -> None:
    _, steps = search(tmp_path, ga.Budget(fraction=0.1), max_steps=80)
    assert min(expected for expected, _, _ in steps[:20]) > 0.9
    assert steps[-1][0] < 0.3


def test_more_weight_keeps_fewer_parameters(tmp_path: Path) -> None:
    kept = []
    for weight in (0.0, 0.1, 1.0, 10.0):
        adapters, _ = search(tmp_path, ga.L0(weight=weight), max_steps=80)
        kept.append(adapters.structure.params / adapters.bank.dense_cost())
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 0.9
    assert 0.2 < kept[1] < 0.8
    assert kept[-1] == 0


def test_without_a_prune_discretizing_keeps_to_the_budget_trained_under(tmp_path: Path) -> None:
    schedule = ga.Schedule(warmup=0, ramp=0.5, prune=None)
    adapters, _ = search(tmp_path, ga.Budget(params=700), schedule=schedule, max_steps=6)
    assert adapters.structure is None
    assert not adapters.bank.frozen
    assert 600 < adapters.discretize().params <= 700
    assert adapters.discretize(ga.Budget(params=300)).params <= 300  # another one, afterwards
    assert adapters.compact().params <= 700


def test_several_tasks_pay_for_the_union(tmp_path: Path) -> None:
    adapters, _ = search(tmp_path, ga.Budget(fraction=0.3), model=gated_classifier(CLASSES))
    structure = adapters.structure
    limit = 0.3 * adapters.bank.dense_cost()
    stored = sum(len(path.kept) * path.params // len(path.kept) for path in structure.paths)
    assert 0.9 * limit < stored == structure.params <= limit
    assert sum(structure.task_params(task) for task in CLASSES) >= structure.params
    shares = structure.sharing()
    assert shares["params_per_task"] == {task: structure.task_params(task) for task in CLASSES}
    assert sum(shares["params_used_by_n_tasks"].values()) == structure.params
    assert 0 <= shares["overlap"]["a / b"] <= 1
    adapters.compact()
    routing = sum(path.routing.numel() for path in adapters.paths.values())
    assert sum(p.numel() for p in adapters.paths.parameters()) + routing == structure.params


def test_a_cap_per_task_holds(tmp_path: Path) -> None:
    budget = ga.Budget(fraction=0.4, per_task=0.25)
    adapters, _ = search(tmp_path, budget, model=gated_classifier(CLASSES))
    dense = adapters.bank.dense_cost()
    for task in CLASSES:
        assert adapters.structure.task_params(task) <= 0.25 * dense
        assert adapters.structure.task_params(task) > 0.2 * dense
    assert adapters.structure.params <= 0.4 * dense


def test_the_length_of_training_comes_from_epochs_as_well_as_from_steps(tmp_path: Path) -> None:
    by_steps, _ = search(tmp_path, ga.Budget(fraction=0.3), schedule=SOON, max_steps=20)
    by_epochs, _ = search(tmp_path, ga.Budget(fraction=0.3), schedule=SOON, max_steps=-1, num_train_epochs=2)
    for adapters in (by_steps, by_epochs):
        assert adapters.pressure.total_steps == 20
        assert int(adapters.bank.step) == 12  # pruned at 0.6 of 20
    assert by_steps.structure == by_epochs.structure
    assert torch.equal(by_steps.bank.log_alpha, by_epochs.bank.log_alpha)


def test_a_budget_below_the_smallest_candidate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="below the smallest candidate"):
        search(tmp_path, ga.Budget(params=10))


def test_one_penalty_at_most_and_a_schedule_only_with_one(tmp_path: Path) -> None:
    model = gated_classifier()
    with pytest.raises(TrainingError, match="drop one"):
        ga.GatedTrainer(model, arguments(tmp_path), budget=ga.Budget(fraction=0.1), penalty=ga.L0(weight=1.0))
    with pytest.raises(TrainingError, match="something to schedule"):
        ga.GatedTrainer(model, arguments(tmp_path), schedule=SOON)


def test_a_penalty_given_when_attaching_is_used_with_the_trainers_schedule(tmp_path: Path) -> None:
    model = gated_classifier()
    ga.detach(model)
    ga.attach(model, SPACE, tasks=model.tasks, penalty=ga.Budget(fraction=0.3), total_steps=1000)
    adapters, _ = search(tmp_path, None, model=model, schedule=SOON, max_steps=10)
    assert adapters.pressure.total_steps == 10
    assert adapters.bank.frozen
    assert adapters.structure.params <= 0.3 * adapters.bank.dense_cost()


def test_a_prune_that_leaves_nothing_to_train_says_so(tmp_path: Path) -> None:
    model = gated_causal()
    with torch.no_grad():
        ga.get_adapters(model).bank.log_alpha.fill_(-4.0)
    data = [row | {"labels": row["input_ids"]} for row in labelled([8])]
    trainer = ga.GatedTrainer(
        model, arguments(tmp_path), train_dataset=data, penalty=ga.L0(weight=1.0), schedule=SOON, gate_learning_rate=0.0
    )
    with pytest.raises(TrainingError, match="nothing is left to train"):
        trainer.train()
    assert trainer.state.global_step == 6


@pytest.mark.parametrize("classes", [None, CLASSES], ids=["one task", "two"])
def test_a_smaller_budget_after_a_prune_is_met_at_once(tmp_path: Path, classes: dict[str, int] | None) -> None:
    model = gated_classifier(classes)
    adapters, _ = search(tmp_path, ga.Budget(fraction=0.5), model=model, max_steps=8)
    first = adapters.structure
    adapters.set_penalty(ga.Budget(fraction=0.6), total_steps=8)
    assert adapters.structure is first  # nothing to do
    search(tmp_path, ga.Budget(fraction=0.1), model=model, max_steps=4)
    found = adapters.compact()
    assert 0.05 < found.params / found.dense_params <= 0.1
    assert {path.key for path in found.paths} <= {path.key for path in first.paths}
