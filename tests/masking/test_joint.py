"""Gated paths and masked elements in one run, under one budget, in one artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from masked_processes import arguments, examples
from masked_recipes import assert_same_bits, counted_mask, random_mask, snapshot
from safetensors.torch import load_file

import gatedadapters as ga
from gatedadapters.errors import ArtifactError, BudgetError, TrainingError
from gatedadapters.testing import tiny
from gatedadapters.testing.helpers import awaken

SPACE = ga.SearchSpace.parse({"paths": [{"kind": "lora", "rank": 4, "at": {"roles": ["q", "v"]}}]}, where="here")


def test_one_budget_counts_both_and_one_folder_holds_both(tmp_path: Path) -> None:
    model, batch = tiny("llama", head="lm")
    before = snapshot(model)
    mask = random_mask(model, 0.01)
    adapters = ga.attach(model, SPACE, batch)
    delta = ga.apply_mask(model, mask)
    budget = delta.params + 500
    args = arguments(tmp_path / "run", max_steps=10, learning_rate=1e-2, save_strategy="steps", save_steps=10)
    trainer = ga.GatedTrainer(
        model,
        args,
        train_dataset=examples(24),
        budget=ga.Budget(params=budget),
        delta_learning_rate=3e-3,
        schedule=ga.Schedule(warmup=0.2, ramp=0.5, prune=0.6),
    )
    trainer.train()
    groups = trainer.optimizer.param_groups
    (own,) = [group for group in groups if any(p is next(delta.parameters()) for p in group["params"])]
    assert own["initial_lr"] == 3e-3
    assert len(own["params"]) == len(list(delta.parameters()))
    stored = load_file(tmp_path / "run" / "checkpoint-10" / "model.safetensors")
    assert {key.partition(".")[0] for key in stored} == {"gated_adapters", "sparse_delta"}
    structure = adapters.compact()
    assert 0 < structure.params <= 500
    assert structure.params + delta.params <= budget
    table = ga.budget_report(model)
    assert f"{structure.params:,}" in table
    assert f"{delta.params:,}" in table
    ga.save_joint(model, tmp_path / "both")
    output = model.eval()(**batch)[0]
    notes = tmp_path / "both" / "adapters" / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes.txt"):
        ga.save_joint(model, tmp_path / "both", overwrite=True)
    assert notes.read_text() == "mine"
    notes.unlink()
    ga.save_joint(model, tmp_path / "both", overwrite=True)
    fresh, _ = tiny("llama", head="lm")
    again, tuned = ga.load_joint(fresh, tmp_path / "both")
    assert torch.equal(fresh(**batch)[0], output)
    tuned.remove()
    again.detach()
    assert_same_bits(fresh, before)


def test_a_budget_given_before_the_mask_is_not_taken_for_a_joint_one(tmp_path: Path) -> None:
    model, batch = tiny("llama", head="lm")
    mask = random_mask(model, 0.01)
    ga.attach(model, SPACE, batch, penalty=ga.Budget(params=500), total_steps=3)
    ga.apply_mask(model, mask)
    args = arguments(tmp_path / "run", max_steps=3)
    with pytest.raises(TrainingError, match=r"may be for the adapters alone[\s\S]*params=500[\s\S]*fix: .*budget="):
        ga.GatedTrainer(model, args, train_dataset=examples(8))
    ga.GatedTrainer(model, args, train_dataset=examples(8), penalty=ga.Budget(params=500))


@pytest.mark.parametrize("head", ["lm", "classification"])
@pytest.mark.parametrize("first", ["adapters", "delta"])
def test_either_may_come_first_and_both_learn_and_come_back(tmp_path: Path, first: str, head: str) -> None:
    model, batch = tiny("llama", head=head)
    before = snapshot(model)
    chosen = {"model.embed_tokens.weight": torch.arange(0, 64, 2), "model.norm.weight": torch.arange(5)}
    heads = () if head == "lm" else ("score.weight",)
    mask = ga.Mask.build(model, chosen, heads=frozenset(heads))

    def tuned() -> ga.SparseDelta:
        delta = ga.apply_mask(model, mask)
        with torch.no_grad():
            for part in delta.parts():
                part.values.add_(0.05)
        delta.write()
        return delta

    if first == "adapters":
        adapters = ga.attach(model, SPACE, batch)
        delta = tuned()
    else:
        delta = tuned()
        adapters = ga.attach(model, SPACE, batch)
    assert adapters.head_names == delta.head_names == heads
    awaken(adapters.paths)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    own = [*adapters.parameters(), *delta.parameters(), *adapters.head_parameters()]
    assert trained == {id(p) for p in own}
    adapters.compact()
    ga.save_joint(model, tmp_path / "both")
    output = model.eval()(**batch)[0]
    fresh, _ = tiny("llama", head=head)
    again, loaded = ga.load_joint(fresh, tmp_path / "both")
    assert torch.equal(fresh.eval()(**batch)[0], output)
    loaded.remove()
    again.detach()
    assert_same_bits(fresh, before)


@pytest.mark.parametrize("at", [3, 6], ids=["before the prune", "after it"])
def test_a_joint_run_resumes_bit_for_bit(at: int, tmp_path: Path) -> None:
    def run(folder: Path, resume: Path | None = None) -> ga.GatedTrainer:
        torch.manual_seed(99 if resume else 0)  # what a new process starts from
        model, batch = tiny("llama", head="classification")
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.2
        heads = frozenset({"score.weight"})
        mask = ga.Mask.build(
            model, {n: torch.arange(4) for n, p in model.named_parameters() if n not in heads}, heads=heads
        )
        ga.attach(model, SPACE, batch, heads=())
        delta = ga.apply_mask(model, mask)  # it alone trains the head
        args = arguments(folder, max_steps=8, learning_rate=1e-2, save_strategy="steps", save_steps=3)
        trainer = ga.GatedTrainer(
            model,
            args,
            train_dataset=labelled(24),
            budget=ga.Budget(params=delta.params + 100),
            delta_learning_rate=3e-3,
            schedule=ga.Schedule(warmup=0.2, ramp=0.5, prune=0.6),
        )
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return trainer

    whole = run(tmp_path / "a")
    resumed = run(tmp_path / "b", tmp_path / "a" / f"checkpoint-{at}")
    assert whole.adapters.bank is not None
    assert whole.adapters.bank.frozen
    for one, other in zip(whole.delta.parts(), resumed.delta.parts(), strict=True):
        assert torch.equal(one.values, other.values)
    states = [trainer.model.state_dict() for trainer in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []
    assert not torch.equal(states[0]["score.weight"], tiny("llama", head="classification")[0].score.weight)
    moments = [trainer.optimizer.state_dict()["state"] for trainer in (whole, resumed)]
    assert moments[0].keys() == moments[1].keys()
    for index, held in moments[0].items():
        assert all(torch.equal(value, moments[1][index][key]) for key, value in held.items())
    moved = sum(int((part.values != part.originals).sum()) for part in whole.delta.parts())
    assert moved > 0.8 * whole.delta.params  # all but those of the padding token


def labelled(size: int) -> list[dict[str, Any]]:
    return [{**row, "labels": row["input_ids"][0] % 2} for row in examples(size)]


def test_saved_adapters_load_beside_a_delta_that_has_learned(tmp_path: Path) -> None:
    model, batch = tiny("llama", head="lm")
    ga.attach(model, SPACE, batch).compact()
    ga.get_adapters(model).save(tmp_path / "adapters")
    ga.detach(model)
    delta = ga.apply_mask(model, counted_mask(model))
    with torch.no_grad():
        for part in delta.parts():
            part.values.add_(0.05)
    delta.write()
    ga.load_adapters(model, tmp_path / "adapters").detach()
    assert all(values.requires_grad for values in delta.parameters())


def test_a_budget_that_the_mask_alone_takes_is_refused(tmp_path: Path) -> None:
    model, batch = tiny("llama", head="lm")
    mask = random_mask(model, 0.01)
    ga.attach(model, SPACE, batch)
    delta = ga.apply_mask(model, mask)
    with pytest.raises(BudgetError, match="delta alone"):
        ga.GatedTrainer(model, arguments(tmp_path), budget=ga.Budget(params=delta.params))


def test_a_joint_checkpoint_of_another_mask_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    def trainer(folder: Path, seed: int) -> ga.GatedTrainer:
        model, batch = tiny("llama", head="lm")
        mask = counted_mask(model, seed=seed)
        ga.attach(model, SPACE, batch)
        ga.apply_mask(model, mask)
        args = arguments(folder, max_steps=2, save_strategy="steps", save_steps=1, learning_rate=1e-2)
        return ga.GatedTrainer(model, args, train_dataset=examples(8))

    trainer(tmp_path / "a", seed=0).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-1")
    other = trainer(tmp_path / "b", seed=1)
    before = snapshot(other.model)
    with pytest.raises(TrainingError, match="another mask"):
        other.train(resume_from_checkpoint=checkpoint)
    assert_same_bits(other.model, before)
    trainer(tmp_path / "c", seed=0).train(resume_from_checkpoint=checkpoint)
