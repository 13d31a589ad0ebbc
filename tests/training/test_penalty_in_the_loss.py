"""A penalty that was set and is in no loss stops the training, in a plain loop and under a plain Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from recipes import SOON, arguments, continued, gated_causal, gated_classifier, labelled
from transformers import Trainer

import gatedadapters as ga
from gatedadapters.errors import TrainingError

STEPS = 10
SILENT = "in no loss"


def loop(model: Any, asked: Any, *, steps: int = STEPS, stepped: Any = None) -> int:
    """Train without a Trainer; `asked(step)` says whether a step adds the penalty. Returns the steps that were made."""
    adapters = ga.get_adapters(model.train())
    parameters = [*adapters.weight_parameters(), *adapters.head_parameters(), *adapters.gate_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    rows = labelled([4])
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    for step in range(steps):
        loss = model(**batch).loss
        if asked(step):
            loss = loss + adapters.penalty()
        loss.backward()
        try:
            optimizer.step() if stepped is None else stepped(adapters)
        except TrainingError:
            assert step < steps
            model.made = step
            raise
        optimizer.zero_grad()
    return steps


def gated(penalty: Any, *, schedule: ga.Schedule = SOON) -> Any:
    model = gated_classifier()
    ga.get_adapters(model).set_penalty(penalty, schedule=schedule, total_steps=STEPS)
    return model


@pytest.mark.parametrize("penalty", [ga.Budget(fraction=0.3), ga.L0(weight=0.1)], ids=["budget", "l0"])
def test_a_loop_that_forgets_the_penalty_stops_at_the_first_step_it_would_act_in(penalty: Any) -> None:
    model = gated(penalty)
    adapters = ga.get_adapters(model)
    before = {}
    with pytest.raises(TrainingError, match=rf"{SILENT}(.|\n)*loss \+ adapters.penalty\(\)(.|\n)*ga.gated"):
        loop(model, lambda step: before.update(adapters.bank.state_dict()))
    assert model.made == 3  # the warm-up of 0.2 is over after two steps, and the ramp rises from 0
    assert not adapters.bank.frozen


def test_a_schedule_without_a_ramp_stops_before_it_prunes() -> None:
    model = gated(ga.Budget(fraction=0.3), schedule=ga.Schedule(warmup=0.1, ramp=0.1, prune=0.1))
    with pytest.raises(TrainingError, match=SILENT):
        loop(model, lambda step: False)
    assert model.made == 0
    assert ga.get_adapters(model).structure is None


def test_an_optimiser_that_is_none_of_torchs_stops_too() -> None:
    model = gated(ga.Budget(fraction=0.3))
    with pytest.raises(TrainingError, match=SILENT):
        loop(model, lambda step: False, stepped=lambda adapters: adapters.bank.next_step())
    assert ga.get_adapters(model).structure is None


@pytest.mark.parametrize("asked", [lambda step: True, lambda step: step % 2 == 1], ids=["always", "sometimes"])
def test_a_loop_that_asks_for_the_penalty_trains(asked: Any) -> None:
    model = gated(ga.Budget(fraction=0.3))
    assert loop(model, asked) == STEPS
    assert ga.get_adapters(model).structure is not None


def test_a_penalty_of_weight_0_and_gates_that_are_fixed_need_not_be_asked_for() -> None:
    model = gated(ga.L0(weight=0.0), schedule=ga.Schedule(warmup=0, ramp=0, prune=None))
    assert loop(model, lambda step: False) == STEPS
    model = gated(ga.Budget(fraction=0.3))
    ga.get_adapters(model).prune(ga.get_adapters(model).discretize())
    assert loop(model, lambda step: False) == STEPS


def test_a_plain_trainer_stops_and_its_gated_version_does_not(tmp_path: Path) -> None:
    model = gated(ga.Budget(fraction=0.3))
    with pytest.raises(TrainingError, match=SILENT):
        Trainer(model, arguments(tmp_path), train_dataset=labelled([40])).train()
    model = gated(ga.Budget(fraction=0.3))
    ga.gated(Trainer)(model, arguments(tmp_path), train_dataset=labelled([40])).train()
    assert ga.get_adapters(model).structure is not None


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks by the old name
def test_peft_on_top_of_gated_adapters_is_refused_at_the_first_step(tmp_path: Path) -> None:
    model = gated_causal()
    both = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(TrainingError, match=r"peft's adapters would be trained alone(.|\n)*ga.detach"):
        Trainer(both, arguments(tmp_path), train_dataset=continued(8)).train()


def test_adapters_frozen_on_purpose_do_not_stop_a_forward() -> None:
    model = gated_classifier()
    ga.get_adapters(model).requires_grad_(False)
    rows = labelled([4])
    model.train()(**{name: torch.tensor([row[name] for row in rows]) for name in rows[0]}).loss.backward()
