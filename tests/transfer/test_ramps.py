"""Probabilities that change over training: they follow the optimiser, also where training is resumed."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import gatedadapters as ga
from gatedadapters.errors import TrainingError
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


def test_several_optimisers_on_one_model_make_one_step(caplog: pytest.LogCaptureFixture) -> None:
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
            handle.follow(optimizer)
        assert handle.step == 4
        for done in (5, 6):
            model.train()(**batch)
            for optimizer in later:
                optimizer.step()
            assert handle.step == done
    assert not caplog.records


@pytest.mark.parametrize("handed_in", [True, False], ids=["handed in", "not handed in"])
def test_a_resumed_trainer_goes_on_with_the_ramp(
    handed_in: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
            callbacks = [ga.FollowOptimizer()] if handed_in else []
            trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=callbacks)
            model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append(handle.probabilities[0]))
            trainer.train(resume_from_checkpoint=checkpoint)
        return seen, model.state_dict()

    whole, weights = train(None)
    assert whole == pytest.approx([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5])
    with caplog.at_level(logging.WARNING, "gatedadapters"):
        again, same = train(str(tmp_path / "out" / "checkpoint-3"))
    if handed_in:
        assert again == whole[6:]
        assert all(torch.equal(value, same[name]) for name, value in weights.items())
        assert not caplog.records
    else:
        assert again == [0, 0, *whole[8:]]  # the first step could not know
        (record,) = caplog.records
        assert "3 steps of this ramp are done" in record.getMessage()
        assert "callbacks=[ga.FollowOptimizer()]" in record.getMessage()


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
        handle.follow(later)
        model.train()(**batch)
        assert handle.probabilities[0] == pytest.approx(0.4)
        later.step()
        assert handle.step == 5
        later.load_state_dict(saved)  # once more, into the same optimiser
        handle.follow(later)
        assert handle.step == 4
    with ga.weaken_knowledge(model, mask=ramp, drop=0.0, total_steps=8) as handle:
        handle.follow(optimizer)  # nothing was loaded into it
        assert handle.step == 0


def test_a_loop_that_hands_nothing_in_is_told_how_and_goes_on_from_its_second_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, batch = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ramp = ga.Ramp(end=0.8)
    with ga.weaken_knowledge(model, mask=ramp, drop=0.0, total_steps=8):
        for _ in range(4):
            optimizer.step()
    later = torch.optim.SGD(model.parameters(), lr=0.0)
    later.load_state_dict(optimizer.state_dict())
    with (
        caplog.at_level(logging.WARNING, "gatedadapters"),
        ga.weaken_knowledge(model, mask=ramp, drop=0.0, total_steps=8) as handle,
    ):
        for done in (5, 6):
            model.train()(**batch)
            later.step()
            assert handle.step == done
    (record,) = caplog.records
    assert "call follow(optimizer)" in record.getMessage()


def test_an_optimiser_of_another_model_cannot_be_followed() -> None:
    model, _ = tiny("llama")
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)
    with ga.weaken_knowledge(model, mask=ga.Ramp(end=0.8), drop=0.0, total_steps=8) as handle:
        with pytest.raises(TrainingError, match="does not train the weakened model"):
            handle.follow(other)
        assert handle.step == 0


def test_a_ramp_stands_still_while_nothing_of_the_model_is_trained() -> None:
    """An optimiser may hold parameters that are frozen for a while."""
    model, _ = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with ga.weaken_knowledge(model, mask=ga.Ramp(end=0.8), drop=0.0, total_steps=8) as handle:
        for frozen, done in ((False, 1), (True, 1), (False, 2)):
            model.requires_grad_(not frozen)
            optimizer.step()
            assert handle.step == done


def test_the_copy_of_a_weakened_model_has_a_ramp_of_its_own() -> None:
    model, batch = tiny("llama")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with ga.weaken_knowledge(model, mask=ga.Ramp(end=0.8), drop=0.0, total_steps=8) as handle:
        optimizer.step()
        twin = copy.deepcopy(model)
        optimizer.step()
        (own,) = {
            hook.weakening
            for module in twin.modules()
            for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
            if hasattr(hook, "weakening")
        }
        assert (handle.step, own.step) == (2, 1)
        torch.optim.SGD(twin.parameters(), lr=0.0).step()
        assert (handle.step, own.step) == (2, 2)
        twin.train()(**batch)
