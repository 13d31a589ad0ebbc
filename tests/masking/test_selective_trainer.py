"""Score, select, tune and report in one call, through transformers' Trainer and on two processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_processes import arguments, examples, trained
from masked_recipes import assert_same_bits, counted_mask, random_mask, snapshot
from safetensors.torch import load_file, save_file

import gatedadapters as ga
from gatedadapters.errors import TrainingError
from gatedadapters.testing import tiny


def test_one_call_scores_selects_tunes_and_reports(tmp_path: Path) -> None:
    model, _ = tiny("llama", head="lm")
    before = snapshot(model)
    trainer = ga.SelectiveTrainer(
        model, arguments(tmp_path, max_steps=10, learning_rate=1e-2), train_dataset=examples(24, seed=0),
        general_dataset=examples(24, seed=1), eval_dataset=examples(8, seed=0),
        general_eval_dataset=examples(8, seed=1),
        selection=ga.SelectionConfig(core=0.9, exclude=("norm",)),
    )  # fmt: skip
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
    stored = checkpoint / "model.safetensors"
    save_file(load_file(stored), stored, metadata={"format": "pt"})  # as before masks were recorded
    trainer(tmp_path / "c", seed=0).train(resume_from_checkpoint=str(checkpoint))


def test_a_mask_of_ones_own_needs_no_general_data(tmp_path: Path) -> None:
    model, _ = tiny("llama", head="lm")
    mask = random_mask(model)
    trainer = ga.SelectiveTrainer(model, arguments(tmp_path, max_steps=2), train_dataset=examples(8), mask=mask)
    trainer.train()
    assert trainer.delta.mask == mask
    with pytest.raises(TrainingError, match="must not lose"):
        ga.SelectiveTrainer(tiny("llama", head="lm")[0], arguments(tmp_path), train_dataset=examples(8))


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
    tmp_path: Path, on_two_processes: Callable[[Path, Path], None]
) -> None:
    on_two_processes(Path(__file__).with_name("masked_processes.py"), tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    single = trained(tmp_path / "single", processes=1)
    assert first.keys() == single.keys()
    for name, value in single.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
