"""Probabilities that change over training: they follow the optimiser, also where training is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import gatedadapters as ga
from gatedadapters.testing.backbones import tiny


def test_ramp_follows_the_optimiser() -> None:
    model, batch = tiny("llama")
    ramp = ga.Ramp(start=0.0, end=0.4, begin=0.25, finish=0.75)
    with ga.weaken_knowledge(model, mask=ramp, drop=0.1, total_steps=8) as handle:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
        seen = []
        for _ in range(9):
            seen.append(handle.probabilities[0])
            model.train()(**batch)
            other.step()
            optimizer.step()
    assert seen == pytest.approx([0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_several_optimisers_on_one_model_make_one_step() -> None:
    model, batch = tiny("llama")
    by_layer = [torch.optim.SGD(layer.parameters(), lr=0.0) for layer in model.layers]
    with ga.weaken_knowledge(model, mask=ga.Ramp(end=0.8), drop=0.0, total_steps=8) as handle:
        for done in range(1, 5):
            model.train()(**batch)
            for optimizer in by_layer:
                optimizer.step()
            assert handle.step == done
    saved = [optimizer.state_dict() for optimizer in by_layer]
    later = [torch.optim.SGD(layer.parameters(), lr=0.0) for layer in model.layers]
    with ga.weaken_knowledge(model, mask=ga.Ramp(end=0.8), drop=0.0, total_steps=8) as handle:
        for optimizer, state in zip(later, saved, strict=True):
            optimizer.load_state_dict(state)
        for done in (5, 6):
            model.train()(**batch)
            for optimizer in later:
                optimizer.step()
            assert handle.step == done


def test_a_resumed_trainer_goes_on_with_the_ramp(tmp_path: Path) -> None:
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(16)]

    def train(checkpoint: str | None) -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model = tiny("llama", head="lm")[0]
        args = TrainingArguments(
            str(tmp_path / "out"),
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_steps=3,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        seen: list[float] = []
        with ga.weaken_knowledge(model, mask=ga.Ramp(end=0.6), drop=ga.Ramp(end=0.5), total_steps=6) as handle:
            trainer = Trainer(model=model, args=args, train_dataset=rows)
            model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(handle.probabilities[0]))
            trainer.train(resume_from_checkpoint=checkpoint)
        return seen, model.state_dict()

    whole, weights = train(None)
    assert whole == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5])
    again, same = train(str(tmp_path / "out" / "checkpoint-3"))
    assert again == whole[6:]
    assert all(torch.equal(value, same[name]) for name, value in weights.items())


def test_a_loop_goes_on_with_the_ramp_of_the_optimiser_it_loads_and_begins_anew_with_its_own() -> None:
    model, batch = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ramp = ga.Ramp(end=0.8)
    with ga.weaken_knowledge(model, mask=ramp, drop=0.0, total_steps=8):
        for _ in range(4):
            optimizer.step()
    saved = optimizer.state_dict()
    with ga.weaken_knowledge(model, mask=ramp, drop=0.0, total_steps=8) as handle:
        model.train()(**batch)
        optimizer.step()
        assert handle.step == 1
    later = torch.optim.SGD(model.parameters(), lr=0.0)
    with ga.weaken_knowledge(model, mask=ramp, drop=0.0, total_steps=8) as handle:
        later.load_state_dict(saved)
        model.eval()(**batch)
        assert handle.step == 0
        model.train()(**batch)
        assert handle.probabilities[0] == pytest.approx(0.4)
        later.step()
        assert handle.step == 5
