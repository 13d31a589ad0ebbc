"""Gates have a learning rate of their own, no decay, and whichever optimiser steps begins a new draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import SOON, Watch, arguments, gated_classifier, labelled

import gatedadapters as ga
from gatedadapters.errors import TrainingError
from gatedadapters.training.rates import default_gate_rate, rewarmed, rewound

IMPLEMENTATIONS = {
    "adamw-fused": lambda groups: torch.optim.AdamW(groups, fused=True),
    "adamw-foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "adamw-for-loop": lambda groups: torch.optim.AdamW(groups, foreach=False, fused=False),
    "sgd-momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "sgd-fused": lambda groups: torch.optim.SGD(groups, fused=True),
}


def rates(model: Any, optimizer: Any) -> tuple[list[float], float, float]:
    """Learning rates of the weights' groups, the gates' rate, the gates' decay; each gate in exactly one group."""
    gate = ga.get_adapters(model).bank.log_alpha
    weights, gates = [], []
    for group in optimizer.param_groups:
        (gates if any(p is gate for p in group["params"]) else weights).append(group)
    assert len(gates) == 1
    assert len(gates[0]["params"]) == 1
    return [group["lr"] for group in weights], gates[0]["lr"], gates[0]["weight_decay"]


def run(folder: Path, *, gate_rate: float | None = None, **changes: Any) -> tuple[ga.GatedTrainer, list[Any]]:
    watch = Watch(rates)
    trainer = ga.GatedTrainer(
        gated_classifier(),
        arguments(folder, **changes),
        train_dataset=labelled([40]),
        budget=ga.Budget(fraction=0.3),
        schedule=SOON,
        gate_learning_rate=gate_rate,
        callbacks=[watch],
    )
    trainer.train()
    return trainer, watch.seen


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt", "polynomial"])
def test_gates_keep_their_rate_while_the_weights_follow_the_schedule(schedule: str, tmp_path: Path) -> None:
    _, seen = run(tmp_path, lr_scheduler_type=schedule, warmup_steps=2, weight_decay=0.5)
    expected = default_gate_rate(SOON, 10)
    assert [gate for _, gate, _ in seen] == [expected] * 10
    assert {decay for _, _, decay in seen} == {0.0}
    first_group = [weights[0] for weights, _, _ in seen]
    assert first_group[0] == 0.0  # warming up
    assert max(first_group) == pytest.approx(1e-2)
    if schedule != "constant_with_warmup":
        assert first_group[-1] < 0.9 * max(first_group)


def test_paths_learn_at_the_rate_of_what_the_budget_keeps_and_heads_at_the_full_rate(tmp_path: Path) -> None:
    def look(model: Any, optimizer: Any) -> dict[str, float]:
        adapters = ga.get_adapters(model)
        kinds = {"paths": adapters.weight_parameters(), "heads": adapters.head_parameters()}
        return {
            kind: group["lr"]
            for kind, parameters in kinds.items()
            for group in optimizer.param_groups
            if any(p is q for p in parameters for q in group["params"])
        } | {"expected": float(adapters.bank.expected_cost().detach())}

    watch = Watch(look)
    trainer = ga.GatedTrainer(
        gated_classifier(),
        arguments(tmp_path, lr_scheduler_type="constant", max_steps=40),
        train_dataset=labelled([40]),
        budget=ga.Budget(fraction=0.1),
        schedule=ga.Schedule(warmup=0.2, ramp=0.5, prune=0.6),
        prior=None,  # a prior changes what is expected to be open, and so do the gates' rates
        callbacks=[watch],
    )
    trainer.train()
    shares = [seen["paths"] / 1e-2 for seen in watch.seen]
    assert [seen["heads"] for seen in watch.seen] == [1e-2] * 40
    assert shares[24:] == [1.0] * 16
    assert shares[:8] == [shares[0]] * 8
    for share, seen in zip(shares[8:20], watch.seen[8:20], strict=True):
        # what is kept also holds what the lower bound of log alpha leaves open of the rest
        assert share == pytest.approx(shares[0] * watch.seen[0]["expected"] / seen["expected"], rel=0.02)
    assert 0.1 < shares[0] < 0.15


def test_the_groups_of_an_l0_run_all_learn_at_the_rate_given(tmp_path: Path) -> None:
    watch = Watch(rates)
    trainer = ga.GatedTrainer(
        gated_classifier(),
        arguments(tmp_path, lr_scheduler_type="constant"),
        train_dataset=labelled([40]),
        penalty=ga.L0(weight=0.1),
        schedule=SOON,
        callbacks=[watch],
    )
    trainer.train()
    factors = set(trainer.adapters.rate_factors().values())
    assert {rate for weights, _, _ in watch.seen for rate in weights} == {1e-2 * factor for factor in factors} | {1e-2}


def test_a_plateau_lowers_the_rate_of_weights_only(tmp_path: Path) -> None:
    watch = Watch(rates)
    args = arguments(
        tmp_path,
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.1},
        eval_strategy="steps",
        eval_steps=1,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer = ga.GatedTrainer(
        gated_classifier(),
        args,
        train_dataset=labelled([40]),
        eval_dataset=labelled([8], seed=1),
        budget=ga.Budget(fraction=0.3),
        schedule=SOON,
        gate_learning_rate=0.2,
        callbacks=[watch],
    )
    trainer.train()
    assert {gate for _, gate, _ in watch.seen} == {0.2}
    assert watch.seen[-1][0][0] < 1e-2


def test_a_given_gate_rate_is_used(tmp_path: Path) -> None:
    _, seen = run(tmp_path, gate_rate=0.123)
    assert {gate for _, gate, _ in seen} == {0.123}


def test_decay_moves_no_gate(tmp_path: Path) -> None:
    """Decay strong enough to empty any weight in ten steps; the gates take the same way with and without it."""
    gates = []
    for decay in (0.0, 20.0):
        model = gated_classifier()
        args = arguments(tmp_path, weight_decay=decay, max_steps=1, learning_rate=1e-3)
        ga.GatedTrainer(model, args, train_dataset=labelled([40]), penalty=ga.L0(weight=1.0)).train()
        gates.append(ga.get_adapters(model).bank.log_alpha.detach().clone())
    assert torch.equal(*gates)


def test_the_default_rate_crosses_the_range_of_the_gates_within_the_ramp() -> None:
    schedule = ga.Schedule(warmup=0.2, ramp=0.6, prune=0.8)
    assert default_gate_rate(schedule, 1000) * 400 == pytest.approx(8.0)
    assert default_gate_rate(schedule, 1000, probed=100) * 500 == pytest.approx(8.0)  # 400 steps against 100 batches
    assert default_gate_rate(schedule, 10) == 0.3
    assert default_gate_rate(schedule, 10**6) == 0.01


@pytest.mark.parametrize("name", ["adamw_torch_fused", "adamw_torch", "sgd", "adafactor"])
def test_every_optimiser_of_the_trainer_takes_the_gates_along(name: str, tmp_path: Path) -> None:
    trainer, seen = run(tmp_path, optim=name, gate_rate=0.1)
    assert {gate for _, gate, _ in seen} == {0.1}
    bank = trainer.adapters.bank
    assert int(bank.step) == 6  # a draw a step, until the end of the sixth pruned
    assert bank.frozen
    assert not torch.equal(bank.log_alpha, gated_classifier().gated_adapters.bank.log_alpha)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_every_implementation_begins_a_new_draw(name: str, tmp_path: Path) -> None:
    """In a plain loop: fused optimisers advance no version counters, and steps must be seen all the same."""
    model = gated_classifier().train()
    adapters = ga.get_adapters(model)
    adapters.set_penalty(ga.L0(weight=1.0), schedule=ga.Schedule(warmup=0, ramp=0, prune=None))
    groups = [{"params": adapters.weight_parameters(), "lr": 1e-3}, {"params": adapters.gate_parameters(), "lr": 0.1}]
    optimizer = IMPLEMENTATIONS[name](groups)
    rows = labelled([12])
    noises, values = [], []
    for step in range(3):
        for row in rows[4 * step : 4 * step + 4]:  # micro-batches: one draw for all of them
            batch = {key: torch.tensor([row[key]]) for key in row}
            ((model(**batch).loss + adapters.penalty()) / 4).backward()
            noises.append(adapters.bank.noise.clone())
            values.append(adapters.bank.values.clone())
        optimizer.step()
        optimizer.zero_grad()
        assert torch.count_nonzero(adapters.bank.gate_gradient) == 0
    assert int(adapters.bank.step) == 3
    for kept in (noises, values):
        assert all(torch.equal(kept[4 * step], kept[4 * step + i]) for step in range(3) for i in range(4))
        assert not any(torch.equal(kept[4 * step], kept[4 * step + 4]) for step in range(2))


def test_an_optimiser_of_ones_own_works_and_one_without_the_gates_is_refused(tmp_path: Path) -> None:
    def trainer(*, gates: bool) -> ga.GatedTrainer:
        model = gated_classifier()
        adapters = ga.get_adapters(model)
        groups = [{"params": adapters.weight_parameters() + adapters.head_parameters(), "lr": 1e-2}]
        groups += [{"params": adapters.gate_parameters(), "lr": 0.3, "weight_decay": 0.0}] * gates
        optimizer = torch.optim.AdamW(groups)
        return ga.GatedTrainer(
            model,
            arguments(tmp_path),
            train_dataset=labelled([40]),
            optimizers=(optimizer, None),
            budget=ga.Budget(fraction=0.3),
            schedule=SOON,
        )

    good = trainer(gates=True)
    good.train()
    assert good.adapters.bank.frozen
    with pytest.raises(TrainingError, match="leaves the gates out"):
        trainer(gates=False).train()


def test_after_a_prune_the_rate_rises_again_and_repeats_its_descent() -> None:
    descent = lambda step: min(1.0, (step + 1) / 3, (40 - step) / 38)  # noqa: E731 (as a scheduler has it)
    assert rewarmed(4, 2, 40) == 2
    assert rewarmed(40, 0, 400) == 18  # without a warm-up of its own
    factor = rewound(descent, 4, 2, 40, warmup=2)
    assert [factor(step) for step in range(4)] == [descent(step) for step in range(4)]
    assert [factor(step) for step in (4, 5, 6)] == pytest.approx([1 / 3, 2 / 3 * 35 / 36, 34 / 36])
    assert factor(39) == pytest.approx(1 / 36)
    assert rewound(descent, 4, 2, 40)(4) == 1.0  # at once


def test_only_candidates_that_learnt_in_a_probe_are_warmed_up_again(tmp_path: Path) -> None:
    for prior, first in (("gain", 0.5), (None, 1.0)):
        watch = Watch(lambda model, optimizer: {"heads": heads_rate(model, optimizer)})
        trainer = ga.GatedTrainer(
            gated_classifier(),
            arguments(tmp_path, lr_scheduler_type="constant", max_steps=32),
            train_dataset=labelled([40]),
            budget=ga.Budget(fraction=0.1),
            schedule=ga.Schedule(warmup=0.2, ramp=0.5, prune=0.5),
            prior=prior,
            callbacks=[watch],
        )
        trainer.train()
        assert [seen["heads"] / 1e-2 for seen in watch.seen] == pytest.approx([1.0] * 16 + [first] + [1.0] * 15)


def heads_rate(model: Any, optimizer: Any) -> float:
    heads = ga.get_adapters(model).head_parameters()
    return next(g["lr"] for g in optimizer.param_groups if any(p is q for p in heads for q in g["params"]))
