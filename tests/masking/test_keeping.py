"""The protected share that is found from a target for general text."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_processes import arguments, examples
from masked_recipes import assert_same_bits, snapshot

import gatedadapters as ga
from gatedadapters.errors import ConfigError, MaskError, TrainingError
from gatedadapters.masking.keeping import CLOSE, LEAST, MOST, Tried, next_share
from gatedadapters.masking.scores.losses import task_losses
from gatedadapters.testing import tiny


def batches(count: int, *, seed: int) -> list[dict[str, torch.Tensor]]:
    rows = examples(4 * count, seed=seed)
    parts = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    return [{key: torch.tensor([row[key] for row in part]) for key in part[0]} for part in parts]


def knowing() -> Any:
    """A tiny model that has learnt the general text."""
    model, _ = tiny("llama", head="lm")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in itertools.islice(itertools.cycle(batches(6, seed=1)), 40):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model


def trial(model: Any, **changes: Any) -> ga.TuningTrial:
    found = ga.TuningTrial(model, batches(6, seed=0), batches(8, seed=1), steps=8, learning_rate=1e-2, progress=False)
    return replace(found, **changes)


def rise(model: Any, mask: ga.Mask, like: ga.TuningTrial) -> float:
    """The relative rise of the loss on general text over a training, by a loop of the test's own."""

    def loss() -> float:
        with torch.no_grad():
            return float(torch.cat([task_losses(model, batch) for batch in like.held_out]).double().mean())

    model.eval()
    before = loss()
    delta = ga.apply_mask(model, mask)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=like.learning_rate, weight_decay=0.0)
    for step, batch in enumerate(itertools.islice(itertools.cycle(like.train), like.steps)):
        optimizer.param_groups[0]["lr"] = like.learning_rate * (1 - step / like.steps)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(delta.parameters(), 1.0)
        optimizer.step()
    after = loss()
    delta.remove()
    return after / before - 1


def test_the_share_that_is_found_keeps_to_the_target_and_uses_most_of_it() -> None:
    model = knowing()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    general, domain = (ga.score(model, batches(6, seed=seed)) for seed in (1, 0))
    tries = trial(model, tries=8)
    mask = ga.select(general, domain, keep_general=0.05, trial=tries)
    assert_same_bits(model, before)
    assert [module.training for module in model.modules()] == modes
    told = mask.origin["tries"]
    assert len(told) <= 8
    chosen = next(found for found in told if found["free"] == mask.origin["free"])
    assert chosen["rise"] <= chosen["bound"] <= 0.05
    assert all(found["bound"] > 0.05 for found in told if found["free"] > chosen["free"])
    assert rise(model, mask, tries) == pytest.approx(chosen["rise"], abs=1e-4)
    assert mask.count() == round(chosen["free"] * mask.size)


def test_without_held_out_text_and_with_a_share_beside_it_the_target_is_refused() -> None:
    model, _ = tiny("llama", head="lm")
    general = ga.score(model, kind="magnitude")
    for given in (None, trial(model, held_out=[])):
        with pytest.raises(MaskError, match=r"no held-out general text"):
            ga.select(general, keep_general=0.01, trial=given)
    with pytest.raises(MaskError, match="keep_general= alone"):
        ga.select(general, keep_general=0.01, protect=0.9, trial=trial(model))
    with pytest.raises(MaskError, match="above 0"):
        ga.select(general, keep_general=0.0, trial=trial(model))
    with pytest.raises(MaskError, match="nothing to tune on"):
        ga.select(general, keep_general=0.01, trial=trial(model, train=[]))


def test_a_target_that_no_share_meets_names_the_best_that_can_be_had() -> None:
    model = knowing()
    before = snapshot(model)
    general = ga.score(model, batches(6, seed=1))
    with pytest.raises(MaskError, match=r"at best \+\d+\.\d\d % ?.*protect=|at best \+[\d.]+%[\s\S]*protect=0\.9"):
        ga.select(general, keep_general=1e-9, trial=trial(model, learning_rate=1.0, tries=3))
    assert_same_bits(model, before)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_the_search_comes_close_in_few_tries_whatever_the_rise_grows_like(power: float, scale: float) -> None:
    target, tried = 0.01, list[Tried]()
    free: float | None = 0.05
    while free is not None and len(tried) < 20:
        value = scale * free**power
        tried.append(Tried(free, value, value))
        free = next_share(tried, target)
    kept = max((t.free for t in tried if t.bound <= target), default=None)
    reachable = scale * LEAST**power <= target
    assert (kept is not None) == reachable
    assert len(tried) <= 8
    if kept is not None:
        assert kept == MOST or scale * kept**power >= 0.8 * CLOSE * target or math.isclose(kept, LEAST)


def test_a_shorter_try_stands_for_the_whole_training() -> None:
    model = knowing()
    general = ga.score(model, batches(6, seed=1))
    short = ga.select(general, keep_general=1.0, trial=trial(model, try_steps=4, tries=1))
    alone = ga.select(general, keep_general=1.0, trial=trial(model, steps=4, tries=1))
    assert short.origin["tries"][0]["rise"] == pytest.approx(2 * alone.origin["tries"][0]["rise"])


def test_a_trainer_selects_by_the_target(tmp_path: Path) -> None:
    chosen = ga.SelectionConfig(keep_general=0.5, batches=4, tries=2)
    data = {"train_dataset": examples(24), "general_dataset": examples(24, seed=1)}
    args = arguments(tmp_path, max_steps=4)
    with pytest.raises(TrainingError, match="no held-out general data"):
        ga.SelectiveTrainer(tiny("llama", head="lm")[0], args, **data, selection=chosen)
    trainer = ga.SelectiveTrainer(
        tiny("llama", head="lm")[0], args, **data, general_eval_dataset=examples(8, seed=2), selection=chosen
    )
    trainer.train()
    assert trainer.mask is not None
    assert trainer.mask.origin["keep_general"] == 0.5
    assert len(trainer.mask.origin["tries"]) <= 2
    with pytest.raises(ConfigError, match="protect is found from keep_general"):
        ga.SelectionConfig(keep_general=0.01, protect=0.9)
