"""The prune happens at the end of an optimiser step: the one that completes the schedule's share of training."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import SOON, Watch, arguments, assert_same, gated_classifier, labelled, trained
from torch import Tensor
from transformers import TrainerCallback

import gatedadapters as ga
from gatedadapters.gates import Pressure

ROWS = labelled([40])
BUDGET = ga.Budget(fraction=0.3)


def batch_of(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


class Loop:
    """A plain loop over a gated model: nothing but the penalty in the loss."""

    def __init__(self, *, total_steps: int = 10, schedule: ga.Schedule = SOON) -> None:
        self.model = gated_classifier().train()
        self.adapters = ga.get_adapters(self.model)
        self.adapters.set_penalty(BUDGET, schedule=schedule, total_steps=total_steps)
        weights = [*self.adapters.weight_parameters(), *self.adapters.head_parameters()]
        groups = [
            {"params": weights, "lr": 1e-2},
            {"params": self.adapters.gate_parameters(), "lr": 0.3, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups)
        self.at = 0

    def backward(self) -> None:
        start = 4 * self.at % len(ROWS)
        (self.model(**batch_of(ROWS[start : start + 4])).loss + self.adapters.penalty()).backward()
        self.at += 1

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.mark.parametrize("pieces", [1, 2], ids=["whole batches", "accumulated"])
def test_the_prune_ends_the_step_that_completes_its_share(pieces: int, tmp_path: Path) -> None:
    watch = Watch()
    args = arguments(tmp_path, gradient_accumulation_steps=pieces)
    model = gated_classifier()
    ga.GatedTrainer(model, args, train_dataset=ROWS, budget=BUDGET, schedule=SOON, callbacks=[watch]).train()
    assert watch.fixed_before == [False] * 6 + [True] * 4
    assert watch.fixed_after == [False] * 5 + [True] * 5


@pytest.mark.parametrize("share", [0.1, 0.25, 0.6, 2 / 3, 1.0])
@pytest.mark.parametrize("total", [1, 3, 10])
def test_the_rate_rewinds_with_the_step_after_the_prune(share: float, total: int) -> None:
    schedule = ga.Schedule(warmup=0, ramp=share, prune=share)
    loop = Loop(total_steps=total, schedule=schedule)
    assert loop.adapters.pressure.prune_step == math.ceil(share * total - 1e-9)
    for step in range(1, total + 1):
        loop.step()
        assert (loop.adapters.structure is not None) == (step >= loop.adapters.pressure.prune_step)
        assert (loop.adapters.pressure.kept_share(step / total) == 1.0) == (loop.adapters.structure is not None)


def test_a_forward_pass_prunes_nothing() -> None:
    loop = Loop()
    for _ in range(5):
        loop.step()
    loop.backward()
    assert loop.adapters.structure is None
    noise = loop.adapters.bank.noise.clone()
    loop.backward()  # a second micro-batch
    assert torch.equal(loop.adapters.bank.noise, noise)
    loop.optimizer.step()
    assert loop.adapters.structure is not None
    assert not any(p.requires_grad for p in loop.adapters.gate_parameters())


def test_gates_that_a_step_moved_out_of_their_range_are_pruned_from_within_it() -> None:
    """Beyond the bound a gate is as open as at it: which of such units stay is not decided by how far beyond."""
    loop = Loop()
    for _ in range(5):
        loop.step()
    loop.backward()
    bank = loop.adapters.bank
    low, high = bank.config.bounds
    with torch.no_grad():
        bank.log_alpha.copy_(torch.linspace(high, high + 5, bank.n_gates).expand_as(bank.log_alpha))
    bank.log_alpha.grad.zero_()
    loop.optimizer.state.clear()
    clamped = copy.deepcopy(bank)
    with torch.no_grad():
        clamped.log_alpha.clamp_(low, high)
    loop.optimizer.step()
    assert torch.equal(bank.log_alpha, clamped.log_alpha)
    other = Loop()
    other.adapters.bank.load_state_dict(clamped.state_dict())
    wanted = other.adapters.discretize()
    assert [record.kept for record in loop.adapters.structure.paths] == [record.kept for record in wanted.paths]


def test_an_optimiser_that_is_none_of_torchs_prunes_with_next_step() -> None:
    loop, other = Loop(), Loop()
    for _ in range(6):
        loop.step()
        other.backward()
        for group in other.optimizer.param_groups:  # torch's own, by a way that no hook sees
            assert group["params"]
        type(other.optimizer).step.__wrapped__(other.optimizer)
        assert other.adapters.structure is None
        other.adapters.bank.next_step()
        other.optimizer.zero_grad()
    assert other.adapters.structure == loop.adapters.structure
    assert other.adapters.structure is not None
    assert_same(trained(other.model), trained(loop.model))


def test_evaluation_at_the_step_of_the_prune_sees_the_pruned_model(tmp_path: Path) -> None:
    held_out = labelled([12], seed=1)
    losses: dict[int, float] = {}
    copies: dict[int, Any] = {}

    class Compare(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            copies[state.global_step] = copy.deepcopy(kwargs["model"])

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            losses[state.global_step] = metrics["eval_loss"]

    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=12)
    ga.GatedTrainer(
        gated_classifier(),
        args,
        train_dataset=ROWS,
        eval_dataset=held_out,
        budget=BUDGET,
        schedule=SOON,
        callbacks=[Compare()],
    ).train()
    for step in (5, 6):
        model = copies[step].eval()
        adapters = ga.get_adapters(model)
        assert (adapters.structure is not None) == (step == 6)
        adapters.compact()
        with torch.no_grad():
            pruned = float(model(**batch_of(held_out)).loss)
        assert (losses[step] == pytest.approx(pruned, rel=1e-6)) == (step == 6)


# -- checkpoints that were written before the prune moved to the end of a step -----------------------------------------


def unpruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in release 0.1, the prune does not come at the end of a step."""
    monkeypatch.setattr(Pressure, "prune_is_due", lambda pressure, bank: False)


def test_a_checkpoint_of_0_1_that_is_due_is_pruned_as_training_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(folder: Path, resume: Path | None = None, *, watch: Watch | None = None) -> ga.GatedTrainer:
        torch.manual_seed(99 if resume else 0)
        args = arguments(folder, save_strategy="steps", save_steps=1, max_steps=10)
        model = gated_classifier(dropout=0.2)
        callbacks = [] if watch is None else [watch]
        trainer = ga.GatedTrainer(model, args, train_dataset=ROWS, budget=BUDGET, schedule=SOON, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return trainer

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        unpruned(patch)
        run(tmp_path / "old")
    watch = Watch()
    resumed = run(tmp_path / "new", tmp_path / "old" / "checkpoint-6", watch=watch)
    assert watch.fixed_before == [True] * 4
    assert resumed.adapters.structure == whole.adapters.structure
    assert_same(trained(resumed.model), trained(whole.model))


def test_a_loop_that_loads_a_state_of_0_1_that_is_due_prunes_at_the_end_of_its_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = Loop()
    with monkeypatch.context() as patch:
        unpruned(patch)
        for _ in range(6):
            loop.step()
    later = Loop()
    later.model.load_state_dict(loop.model.state_dict())
    later.backward()
    assert later.adapters.structure is None
    later.optimizer.step()
    assert later.adapters.structure is not None
