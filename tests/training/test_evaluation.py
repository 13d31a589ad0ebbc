"""Evaluation leaves no trace in training, and the best model is one within the budget."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import SOON, arguments, assert_same, gated_causal, gated_classifier, labelled, trained
from transformers import EvalPrediction, TrainingArguments

import gatedadapters as ga
from gatedadapters.errors import AttachError, TrainingError

CLASSES = {"a": 3, "b": 2}
TRAIN, EVAL = labelled([20, 20], [3, 2]), labelled([6, 6], [3, 2], seed=1)


def run(folder: Path, *, model: Any = None, options: dict[str, Any] | None = None, **changes: Any) -> Any:
    model = model or gated_classifier(CLASSES)
    settings = {"train_dataset": TRAIN, "eval_dataset": EVAL, "budget": ga.Budget(fraction=0.3), "schedule": SOON}
    trainer = ga.GatedTrainer(model, arguments(folder, **changes), **(settings | (options or {})))
    trainer.train()
    return trainer


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_evaluating_after_every_step_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    watched = run(tmp_path / "watched", eval_strategy="steps", eval_steps=1, options={"compute_metrics": accuracy})
    assert sum("eval_loss" in entry for entry in watched.state.log_history) == 10
    assert_same(trained(watched.model), trained(plain.model))
    assert watched.adapters.structure == plain.adapters.structure
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (plain, watched)]
    assert losses[0] == losses[1]


def test_evaluation_sees_no_penalty_and_no_noise(tmp_path: Path) -> None:
    trainer = run(tmp_path, max_steps=3, options={"schedule": ga.Schedule(warmup=0, ramp=0, prune=None)})
    first, second = (trainer.evaluate()["eval_loss"] for _ in range(2))
    assert first == second
    model = trainer.model.eval()
    batch = {key: torch.tensor([row[key] for row in EVAL]) for key in EVAL[0]}
    with torch.no_grad():
        by_hand = float(model(**batch).loss)
    assert first == pytest.approx(by_hand, rel=1e-5)


def test_the_training_log_tells_how_the_gates_are(tmp_path: Path) -> None:
    trainer = run(tmp_path)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    wanted = {"gates/expected_params", "gates/open_paths", "gates/penalty", "gates/target", "gates/multiplier"}
    assert all(wanted <= entry.keys() for entry in entries)
    assert entries[-1]["gates/expected_params"] == trainer.adapters.structure.params
    dense = trainer.adapters.bank.dense_cost()
    targets = [entry["gates/target"] / dense for entry in entries]
    assert targets[:3] == pytest.approx([1.0, 1.0, 1.0])
    assert targets[-1] == pytest.approx(0.3)


def test_the_best_model_is_one_after_the_prune(tmp_path: Path) -> None:
    """The metric says the first evaluation was best, while everything was still open."""
    falling = iter(range(100, 0, -1))
    trainer = run(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="made_up",
        greater_is_better=True,
        options={"compute_metrics": lambda prediction: {"made_up": float(next(falling))}},
    )
    assert trainer.state.best_global_step == 6  # pruned at its end
    assert trainer.adapters.bank.frozen
    assert trainer.adapters.structure.params <= 0.3 * trainer.adapters.bank.dense_cost()
    batch = {key: torch.tensor([row[key] for row in EVAL]) for key in EVAL[0]}
    with torch.no_grad():
        before = trainer.model.eval()(**batch).logits
        trainer.adapters.compact()
        torch.testing.assert_close(trainer.model(**batch).logits, before, rtol=0, atol=1e-5)


def test_without_a_prune_the_best_of_all_is_loaded_and_cut_to_the_budget(tmp_path: Path) -> None:
    falling = iter(range(100, 0, -1))
    trainer = run(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="made_up",
        greater_is_better=True,
        options={
            "compute_metrics": lambda prediction: {"made_up": float(next(falling))},
            "schedule": ga.Schedule(warmup=0, ramp=0.5, prune=None),
        },
    )
    assert trainer.state.best_global_step == 2
    assert int(trainer.adapters.bank.step) == 2
    assert trainer.adapters.compact().params <= 0.3 * 2760


def test_a_model_loaded_from_before_the_prune_has_no_structure(tmp_path: Path) -> None:
    trainer = run(tmp_path, save_strategy="steps", save_steps=5)
    assert trainer.adapters.structure is not None
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-5"))
    assert trainer.adapters.structure is None
    assert not trainer.adapters.bank.frozen


# -- precision and failures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classifier", "causal"])
def test_bfloat16_trains_and_gates_stay_float32(kind: str, tmp_path: Path) -> None:
    if kind == "causal":
        rows = [row | {"labels": row["input_ids"]} for row in labelled([20])]
        options = {"train_dataset": rows, "eval_dataset": None, "gate_learning_rate": 0.3}
        trainer = run(tmp_path, model=gated_causal(), bf16=True, options=options)
    else:
        trainer = run(tmp_path, bf16=True, max_steps=30)
    bank = trainer.adapters.bank
    assert bank.log_alpha.dtype == bank.noise.dtype == bank.saliency.dtype == torch.float32
    assert bank.frozen
    assert trainer.adapters.structure.params <= 0.3 * bank.dense_cost()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize("unwrapped", [True, False], ids=["unwrapped", "wrapped"])
@pytest.mark.parametrize("before", [True, False], ids=["after bf16", "after fp32"])
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp32"])
def test_a_second_training_of_a_model_has_its_own_precision(
    bf16: bool, before: bool, unwrapped: bool, tmp_path: Path
) -> None:
    """accelerate alone would leave the second as the first was, or in fp32 if the model was unwrapped in between."""
    model = gated_causal()
    options = {"train_dataset": [row | {"labels": row["input_ids"]} for row in labelled([20])], "eval_dataset": None}
    first = run(tmp_path / "first", model=model, bf16=before, max_steps=1, options=options)
    if unwrapped:
        first.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    ga.detach(model)
    ga.attach(model, "attention-only")
    seen = set()
    linear = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    linear.register_forward_hook(lambda module, args, output: seen.add(output.dtype) if module.training else None)
    run(tmp_path / "second", model=model, bf16=bf16, max_steps=1, options=options)
    assert seen == {torch.bfloat16 if bf16 else torch.float32}


def test_the_penalty_is_not_rounded_under_autocast() -> None:
    model = gated_classifier(CLASSES)
    adapters = ga.get_adapters(model)
    for penalty in (ga.L0(weight=1.0), ga.Budget(fraction=0.3, per_task=0.2)):
        adapters.set_penalty(penalty, schedule=ga.Schedule(warmup=0, ramp=0, prune=None), total_steps=10)
        adapters.bank.draw()
        adapters.pressure.ascend(adapters.bank)
        exact, state = adapters.penalty(), copy.deepcopy((adapters.bank.state_dict(), adapters.pressure.state_dict()))
        adapters.pressure.ascend(adapters.bank)
        ascended = adapters.bank.log_alpha.clone(), adapters.pressure.multipliers.clone()
        adapters.bank.load_state_dict(state[0])
        adapters.pressure.load_state_dict(state[1])
        with torch.autocast("cpu", torch.bfloat16):
            assert adapters.penalty().dtype == torch.float32
            assert torch.equal(adapters.penalty(), exact)
            adapters.pressure.ascend(adapters.bank)
        assert torch.equal(adapters.bank.log_alpha, ascended[0])
        assert torch.equal(adapters.pressure.multipliers, ascended[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_with_the_step(value: float, tmp_path: Path) -> None:
    model = gated_classifier(CLASSES)
    calls = 0

    def spoil(module: Any, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return output * value if calls > 3 else output

    model.backbone.embeddings.register_forward_hook(spoil)
    with pytest.raises(TrainingError, match="not finite") as caught:
        run(tmp_path, model=model)
    assert "optimiser step 3" in str(caught.value)
    assert "learning rate" in str(caught.value)


def test_checkpointed_activations_change_nothing(tmp_path: Path) -> None:
    name = "activation_checkpointing"
    if not hasattr(TrainingArguments, name):
        name = "gradient_checkpointing"  # what older releases of transformers call it
    plain = run(tmp_path / "plain")
    for reentrant in (False, True):
        changes = {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}
        saving = run(tmp_path / str(reentrant), **changes)
        assert saving.adapters.checkpointing()
        assert_same(trained(saving.model), trained(plain.model), rtol=1e-4, atol=1e-6)


def test_several_devices_in_one_process_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(TrainingError, match="DataParallel"):
        ga.GatedTrainer(gated_classifier(CLASSES), args)


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    model = gated_classifier(CLASSES)
    ga.detach(model)
    with pytest.raises(AttachError, match="no adapters"):
        ga.GatedTrainer(model, arguments(tmp_path))
