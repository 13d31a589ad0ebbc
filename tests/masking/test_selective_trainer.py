"""Score, select, tune and report in one call, through transformers' Trainer and on two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_processes import arguments, examples, trained
from masked_recipes import assert_same_bits, counted_mask, random_mask, snapshot
from safetensors.torch import load_file

import gatedadapters as ga
from gatedadapters.errors import TrainingError
from gatedadapters.testing import tiny


def test_one_call_scores_selects_tunes_and_reports(tmp_path: Path) -> None:
    model, _ = tiny("llama", head="lm")
    before = snapshot(model)
    trainer = ga.SelectiveTrainer(
        model,
        arguments(tmp_path, max_steps=10, learning_rate=1e-2),
        train_dataset=examples(24, seed=0),
        general_dataset=examples(24, seed=1),
        eval_dataset=examples(8, seed=0),
        general_eval_dataset=examples(8, seed=1),
        selection=ga.SelectionConfig(protect=0.9, exclude=("norm",)),
    )
    with pytest.raises(TrainingError, match="nothing to report"):
        trainer.report()
    trainer.train()
    report = trainer.report()
    assert report.after["domain"] < report.before["domain"]
    assert set(report.before) == {"domain", "general"}
    assert "general" in str(report)
    assert trainer.delta.params == round(0.1 * trainer.mask.size)
    general = ga.score(tiny("llama", head="lm")[0], [], kind="magnitude")
    assert set(trainer.mask.names) == {n for n, role in general.roles.items() if role != "norm"}
    trainer.delta.remove()
    assert_same_bits(model, before)


def test_checkpoints_hold_what_is_trained_and_a_run_resumes_from_them(tmp_path: Path) -> None:
    def run(folder: Path, **resume: Any) -> Any:
        model, _ = tiny("llama", head="lm")
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
        data = {"train_dataset": examples(24, seed=0), "general_dataset": examples(24, seed=1)}
        trainer = ga.SelectiveTrainer(model, arguments(folder, **settings), **data)
        trainer.train(**resume)
        return trainer

    straight = run(tmp_path / "a")
    checkpoint = tmp_path / "a" / "checkpoint-3"
    stored = checkpoint / "model.safetensors"
    assert stored.stat().st_size < 16 * straight.delta.params
    resumed = run(tmp_path / "b", resume_from_checkpoint=str(checkpoint))
    assert_same_bits(resumed.model, snapshot(straight.model))


def test_a_checkpoint_of_a_mask_with_the_same_counts_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    def trainer(folder: Path, seed: int) -> ga.SelectiveTrainer:
        model, _ = tiny("llama", head="lm")
        args = arguments(folder, max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-2)
        return ga.SelectiveTrainer(model, args, train_dataset=examples(8), mask=counted_mask(model, seed=seed))

    trainer(tmp_path / "a", seed=0).train()
    checkpoint = tmp_path / "a" / "checkpoint-1"
    other = trainer(tmp_path / "b", seed=1)
    before = snapshot(other.module)
    with pytest.raises(TrainingError, match=r"another mask[\s\S]*checkpoint-1"):
        other.train(resume_from_checkpoint=str(checkpoint))
    assert_same_bits(other.module, before)
    trainer(tmp_path / "c", seed=0).train(resume_from_checkpoint=str(checkpoint))


def test_a_mask_of_ones_own_needs_no_general_data(tmp_path: Path) -> None:
    model, _ = tiny("llama", head="lm")
    mask = random_mask(model)
    trainer = ga.SelectiveTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=examples(8), mask=mask)
    trainer.train()
    assert trainer.delta.mask == mask
    with pytest.raises(TrainingError, match="no general data"):
        ga.SelectiveTrainer(tiny("llama", head="lm")[0], arguments(tmp_path), train_dataset=examples(8))


def test_the_best_model_is_loaded_in_the_end_where_it_is_not_the_last(tmp_path: Path) -> None:
    model, _ = tiny("llama", head="lm")
    before = snapshot(model)
    settings = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "greater_is_better": True,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_domain_loss",
    }
    trainer = ga.SelectiveTrainer(
        model,
        arguments(tmp_path, **settings),
        train_dataset=examples(8),
        eval_dataset=examples(8),
        mask=counted_mask(model),
    )
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint))
    assert best.name != "checkpoint-4"
    stored = load_file(best / "model.safetensors")
    for name, value in trainer.delta.state_dict().items():
        assert torch.equal(value, stored[f"sparse_delta.{name}"])
    again, _ = tiny("llama", head="lm")
    delta = ga.apply_mask(again, trainer.delta.mask)
    delta.load_state_dict(trainer.delta.state_dict())
    assert_same_bits(again, snapshot(model))
    trainer.delta.remove()
    assert_same_bits(model, before)


def test_a_checkpoint_of_another_base_or_without_its_heads_is_refused(tmp_path: Path) -> None:
    def trainer(folder: Path, *, seed: int = 0, heads: tuple[str, ...] = ()) -> ga.SelectiveTrainer:
        torch.manual_seed(seed)
        model, _ = tiny("llama", head="lm", seed=seed)
        settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        selection = ga.SelectionConfig(kind="random", include=("q", "v"))
        return ga.SelectiveTrainer(
            model, arguments(folder, **settings), train_dataset=examples(8), selection=selection, heads=heads
        )

    trainer(tmp_path / "a").train()
    checkpoint = str(tmp_path / "a" / "checkpoint-1")
    with pytest.raises(TrainingError, match="another backbone"):
        trainer(tmp_path / "b", seed=1).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(TrainingError, match=r"lm_head.weight missing"):
        trainer(tmp_path / "c", heads=("lm_head",)).train(resume_from_checkpoint=checkpoint)
    trainer(tmp_path / "d").train(resume_from_checkpoint=checkpoint)


def test_what_would_spoil_the_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny("llama", head="lm")
    given: dict[str, Any] = {"train_dataset": examples(8), "mask": counted_mask(model)}
    with pytest.raises(TrainingError, match="would round the weights"):
        ga.SelectiveTrainer(model, arguments(tmp_path, bf16_full_eval=True), eval_dataset=examples(8), **given)
    for variable, name in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        args = arguments(tmp_path)
        with monkeypatch.context() as launched:
            launched.setenv(variable, "true")
            with pytest.raises(TrainingError, match=name):
                ga.SelectiveTrainer(model, args, **given)
    ga.attach(model, "lora-all-linear", batch)
    with pytest.raises(TrainingError, match=r"neither trains nor keeps[\s\S]*GatedTrainer"):
        ga.SelectiveTrainer(model, arguments(tmp_path), **given)


def test_a_loss_that_is_no_number_stops_the_run_before_a_step(tmp_path: Path) -> None:
    model, _ = tiny("llama", head="lm")
    trainer = ga.SelectiveTrainer(
        model, arguments(tmp_path, max_steps=2), train_dataset=examples(8), mask=counted_mask(model)
    )
    model.register_forward_hook(lambda module, args, output: output.__setitem__("loss", output["loss"] * float("nan")))
    with pytest.raises(TrainingError, match=r"not finite[\s\S]*optimiser step 0"):
        trainer.train()
    assert all(bool(p.isfinite().all()) for p in trainer.delta.parameters())


def test_two_processes_train_what_one_with_the_whole_batch_does(
    tmp_path: Path, on_processes: Callable[..., None]
) -> None:
    on_processes(Path(__file__).with_name("masked_processes.py"), tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    single = trained(tmp_path / "single", processes=1)
    assert first.pop("mask") == second.pop("mask")
    assert first.keys() == single.keys()
    for name, value in single.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
