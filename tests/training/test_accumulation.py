"""k micro-batches of b are one batch of k b: the penalty counts once per optimiser step, however the loss is scaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import SOON, Watch, arguments, assert_same, continued, gated_causal, gated_classifier, labelled, trained

import gatedadapters as ga

STRONG = 30.0  # an L0 weight whose gradient stands out beside the loss's
AT_ONCE = ga.Schedule(warmup=0, ramp=0, prune=None)


def run(kind: str, folder: Path, batch: int, pieces: int, *, penalty: Any, look: Any = None, **changes: Any) -> Any:
    model = gated_causal() if kind == "causal" else gated_classifier()
    data = continued(20) if kind == "causal" else labelled([20])
    schedule, gate_rate = changes.pop("schedule", SOON), changes.pop("gate_rate", 1.0)
    changes = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 8} | changes
    args = arguments(folder, per_device_train_batch_size=batch, gradient_accumulation_steps=pieces, **changes)
    watch = Watch(look or (lambda model, optimizer: None))
    trainer = ga.GatedTrainer(
        model,
        args,
        train_dataset=data,
        penalty=penalty,
        schedule=schedule,
        gate_learning_rate=gate_rate,
        callbacks=[watch],
    )
    trainer.train()
    return model, watch.seen, trainer


@pytest.mark.parametrize("penalty", [ga.Budget(fraction=0.3), ga.L0(weight=STRONG)], ids=["budget", "l0"])
@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_micro_batches_give_the_weights_and_gates_of_one_large_batch(kind: str, penalty: Any, tmp_path: Path) -> None:
    whole, _, _ = run(kind, tmp_path, 4, 1, penalty=penalty)
    pieces, _, trainer = run(kind, tmp_path, 1, 4, penalty=penalty)
    assert trainer.model_accepts_loss_kwargs is (kind == "causal")
    assert ga.get_adapters(whole).structure == ga.get_adapters(pieces).structure
    assert ga.get_adapters(whole).bank.frozen
    assert_same(trained(pieces), trained(whole), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_the_penalty_counts_once_per_step_also_where_an_epoch_ends_early(kind: str, tmp_path: Path) -> None:
    """20 examples in micro-batches of 1, 8 a step: the third step of the epoch has only 4."""

    def gate_gradient(model: Any, optimizer: Any) -> torch.Tensor:
        gradient: torch.Tensor = ga.get_adapters(model).bank.log_alpha.grad
        return gradient.clone()

    still = {"max_grad_norm": 0.0, "learning_rate": 0.0, "gate_rate": 0.0, "max_steps": 4, "schedule": AT_ONCE}
    _, without, _ = run(kind, tmp_path, 1, 8, penalty=ga.L0(weight=0.0), look=gate_gradient, **still)
    model, with_penalty, _ = run(kind, tmp_path, 1, 8, penalty=ga.L0(weight=STRONG), look=gate_gradient, **still)
    adapters = ga.get_adapters(model)
    (alone,) = torch.autograd.grad(adapters.penalty(), adapters.bank.log_alpha)
    assert len(with_penalty) == 4
    for both, task in zip(with_penalty, without, strict=True):
        torch.testing.assert_close(both - task, alone, rtol=1e-3, atol=1e-5)


def test_the_logged_loss_is_the_tasks_alone(tmp_path: Path) -> None:
    losses = {}
    for weight in (0.0, STRONG):
        _, _, trainer = run("classifier", tmp_path, 4, 1, penalty=ga.L0(weight=weight), max_steps=3, schedule=AT_ONCE)
        losses[weight] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0.0][0] == losses[STRONG][0]
    assert len(losses[0.0]) == 3
