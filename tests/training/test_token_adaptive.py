"""Token-adaptive weights: against the problem that they solve, the formula token by token, and through a Trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from transformers import Trainer, TrainingArguments

import gatedadapters as ga
from gatedadapters.errors import TrainingError
from gatedadapters.testing import tiny
from gatedadapters.training.token_adaptive import token_weights

IGNORED = -100


def test_weights_minimise_the_loss_plus_the_entropy_term() -> None:
    losses, temperature = np.array([0.1, 0.7, 1.5, 4.0, 9.0]), 1.3

    def objective(weights: Any) -> float:
        return float((weights * losses).sum() + temperature * (weights * np.log(weights)).sum())

    found = minimize(
        objective,
        np.full(5, 0.2),
        bounds=[(1e-9, 1)] * 5,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    weights = token_weights(torch.tensor(losses), temperature)
    np.testing.assert_allclose(weights / 5, found.x, atol=1e-5)


def by_formula(logits: torch.Tensor, labels: torch.Tensor, floor: float, count: int | None) -> float:
    """Token by token, in plain Python."""
    sequences = []
    for row, ids in zip(logits.detach().double(), labels.tolist(), strict=True):
        found = []
        for position, target in enumerate(ids[1:]):
            if target != IGNORED:
                scores = [float(score) for score in row[position]]
                found.append(math.log(sum(math.exp(score) for score in scores)) - scores[target])
        if found:
            sequences.append(found)
    means = sorted(sum(found) / len(found) for found in sequences)
    temperature = means[(len(means) - 1) // 2]  # torch's median is the lower one
    losses = [loss for found in sequences for loss in found]
    weights = [max(math.exp(-loss / temperature), floor) for loss in losses]
    total = sum(w * loss for w, loss in zip(weights, losses, strict=True)) * len(losses) / sum(weights)
    return total / (len(losses) if count is None else count)


@pytest.mark.parametrize("count", [None, 17])
def test_the_loss_is_that_of_the_formula(count: int | None) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(4, 6, 11)).requires_grad_()
    labels = torch.randint(0, 11, (4, 6))
    labels[0, :3], labels[2] = IGNORED, IGNORED
    for floor in (0.01, 0.3):
        loss = ga.TokenAdaptiveLoss(floor=floor)({"logits": logits}, labels, num_items_in_batch=count)
        assert float(loss.detach()) == pytest.approx(by_formula(logits, labels, floor, count), rel=1e-5)


def test_no_gradient_passes_through_the_weights() -> None:
    logits = torch.randn(2, 5, 7, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 7, (2, 5))
    ga.TokenAdaptiveLoss(temperature=2.0, floor=0.0)({"logits": logits}, labels).backward()
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1), reduction="none"
    )
    weights = token_weights(losses.detach(), 2.0)
    (wanted,) = torch.autograd.grad((weights * losses).mean(), logits)
    torch.testing.assert_close(logits.grad, wanted, rtol=1e-5, atol=1e-7)


def test_a_high_temperature_and_an_evaluation_give_the_plain_loss() -> None:
    model, batch = tiny("llama", head="lm")
    labels = batch["input_ids"]
    plain = float(model(**batch, labels=labels).loss.detach())
    assert float(ga.TokenAdaptiveLoss(temperature=1e6)(model(**batch), labels).detach()) == pytest.approx(
        plain, rel=1e-5
    )
    with torch.no_grad():
        assert float(ga.TokenAdaptiveLoss()(model(**batch), labels)) == pytest.approx(plain, rel=1e-5)


def test_a_batch_without_a_label_has_a_loss_of_zero_with_a_gradient() -> None:
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = ga.TokenAdaptiveLoss()({"logits": logits}, torch.full((1, 3), IGNORED))
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None


def test_any_trainer_takes_it_and_accumulates_correctly(tmp_path: Path) -> None:
    rows = [{"input_ids": [3 + (i + j) % 20 for j in range(8)]} for i in range(4)]
    rows = [{**row, "labels": row["input_ids"]} for row in rows]

    def trained(batch: int, accumulated: int) -> Trainer:
        model, _ = tiny("llama", head="lm")
        args = TrainingArguments(
            str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = Trainer(model, args, train_dataset=rows, compute_loss_func=ga.TokenAdaptiveLoss())
        trainer.train()
        return trainer

    whole, parts = (trained(*sizes).state.log_history for sizes in ((4, 1), (2, 2)))
    assert whole[2]["loss"] < whole[0]["loss"]
    assert parts[0]["loss"] == pytest.approx(whole[0]["loss"], rel=0.1)


def test_what_is_no_language_model_and_bad_options_are_refused() -> None:
    with pytest.raises(TrainingError, match="a label for every token"):
        ga.TokenAdaptiveLoss()({"logits": torch.zeros(2, 3)}, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TrainingError, match="temperature above 0"):
        ga.TokenAdaptiveLoss(temperature=0.0)
    with pytest.raises(TrainingError, match=r"floor in \[0, 1\]"):
        ga.TokenAdaptiveLoss(floor=1.5)
