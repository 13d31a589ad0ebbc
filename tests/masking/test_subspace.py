"""Matrices tuned in their small singular directions alone; against singular values of numpy, and peft's OSF."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masked_processes import arguments, examples
from masked_recipes import assert_same_bits, counted_mask, loss_of, snapshot
from peft import OSFConfig, get_peft_model
from torch import nn

import gatedadapters as ga
from gatedadapters.errors import ArtifactError, AttachError, MaskError, TrainingError
from gatedadapters.masking.subspace import FreeDirections
from gatedadapters.testing import tiny


def trained(model: nn.Module, batch: Any, parameters: Any, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


@pytest.mark.parametrize("protect", [0.25, 0.75])
def test_training_moves_nothing_along_the_large_singular_directions(protect: float) -> None:
    model, batch = tiny("llama", head="lm")
    before = snapshot(model)
    subspace = ga.apply_subspace(model, protect=protect)
    trained(model, batch, subspace.parameters())
    for name, value in snapshot(model).items():
        change = (value - before[name]).numpy()
        if name not in subspace.names:
            assert not change.any(), name
            continue
        left, _, right = np.linalg.svd(before[name].numpy(), full_matrices=False)
        count = round(protect * min(change.shape))
        assert subspace.protected[name] == count
        size = np.linalg.norm(change)
        assert size > 1e-2
        assert np.linalg.norm(left[:, :count].T @ change) < 1e-5 * size, name
        assert np.linalg.norm(change @ right[:count].T) < 1e-5 * size, name
        grad = model.get_parameter(name).grad.numpy()  # of the last step: what the moments of Adam are made of
        assert np.linalg.norm(left[:, :count].T @ grad) < 1e-5 * np.linalg.norm(grad), name


def test_without_protection_it_is_full_tuning_of_the_matrices() -> None:
    (model, batch), (other, _) = tiny("llama", head="lm"), tiny("llama", head="lm")
    subspace = ga.apply_subspace(model, protect=0.0)
    for name, parameter in other.named_parameters():
        parameter.requires_grad_(name in subspace.names)
    trained(model, batch, subspace.parameters())
    trained(other, batch, [p for p in other.parameters() if p.requires_grad])
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("protected", [3, 9])
def test_what_peft_trains_lies_in_the_same_directions_and_is_all_of_them(shape: Any, protected: int) -> None:
    torch.manual_seed(0)
    rows, columns = shape
    model = nn.Sequential(nn.Linear(columns, rows))
    start = model[0].weight.detach().clone()
    free = FreeDirections(start, protected)
    wrapped: Any = get_peft_model(model, OSFConfig(target_modules=["0"], effective_rank=protected))
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        wrapped(torch.randn(8, columns)).square().sum().backward()
        optimizer.step()
    change = wrapped.merge_and_unload()[0].weight.detach() - start
    assert change.norm() > 1e-2
    torch.testing.assert_close(free.project(change), change, rtol=1e-4, atol=1e-5)
    every = torch.eye(rows * columns).view(-1, rows, columns)
    projections = torch.stack([free.project(one) for one in every]).flatten(1)
    assert (
        np.linalg.matrix_rank(projections.numpy(), tol=1e-4)
        == free.params
        == (rows - protected) * (columns - protected)
    )


def test_fused_experts_are_decomposed_one_by_one() -> None:
    torch.manual_seed(0)
    weight = torch.randn(2, 6, 8)
    free = FreeDirections(weight, 4)
    change = torch.randn(2, 6, 8)
    for expert in range(2):
        single = FreeDirections(weight[expert], 4)
        torch.testing.assert_close(free.project(change)[expert], single.project(change[expert]))
    assert free.params == 2 * (6 - 4) * (8 - 4)


def test_removing_restores_every_bit_and_flag() -> None:
    model, batch = tiny("bert")
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    subspace = ga.apply_subspace(model, include=["q", "v"])
    assert all(".query" in name or ".value" in name for name in subspace.names)
    trained(model, batch, subspace.parameters())
    tuned = snapshot(model)
    with subspace.disabled():
        assert_same_bits(model, before)
    assert_same_bits(model, tuned)
    subspace.remove()
    assert_same_bits(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(AttachError, match="removed or merged"):
        subspace.merge()


def test_a_saved_subspace_loads_with_the_same_bits_and_can_be_trained_on(tmp_path: Path) -> None:
    model, batch = tiny("llama", head="lm")
    subspace = ga.apply_subspace(model)
    trained(model, batch, subspace.parameters())
    subspace.save(tmp_path / "saved")
    tuned = snapshot(model)
    fresh, _ = tiny("llama", head="lm")
    loaded = ga.load_subspace(fresh, tmp_path / "saved")
    assert_same_bits(fresh, tuned)
    trained(model, batch, subspace.parameters())
    trained(fresh, batch, loaded.parameters())
    for (name, one), two in zip(model.named_parameters(), fresh.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4, msg=name)
    loaded.merge()
    with pytest.raises(MaskError, match="another backbone"):
        ga.load_subspace(fresh, tmp_path / "saved")
    values = tmp_path / "saved" / "subspace.safetensors"
    data = bytearray(values.read_bytes())
    data[-1] ^= 1
    values.write_bytes(data)
    with pytest.raises(ArtifactError):
        ga.load_subspace(tiny("llama", head="lm")[0], tmp_path / "saved")


@pytest.mark.parametrize(
    ("name", "count", "told"),
    [
        ("model.norm.weight", 1, "names of matrices of this model"),
        ("no.such.weight", 1, "names of matrices of this model"),
        ("model.layers.0.self_attn.q_proj.weight", 10**6, "at most 32 protected directions"),
    ],
)
def test_a_record_that_does_not_fit_the_model_is_refused(tmp_path: Path, name: str, count: int, told: str) -> None:
    model, _ = tiny("llama", head="lm")
    ga.apply_subspace(model).save(tmp_path / "saved")
    record = tmp_path / "saved" / "subspace.json"
    data = json.loads(record.read_text())
    data["protected"][name] = count
    record.write_text(json.dumps(data))
    fresh, _ = tiny("llama", head="lm")
    before, flags = snapshot(fresh), [p.requires_grad for p in fresh.parameters()]
    with pytest.raises(ArtifactError, match=told):
        ga.load_subspace(fresh, tmp_path / "saved", verify=False)
    assert_same_bits(fresh, before)
    assert [p.requires_grad for p in fresh.parameters()] == flags


def test_what_cannot_work_is_refused_before_the_model_is_changed() -> None:
    model, _ = tiny("llama", head="lm")
    flags = [p.requires_grad for p in model.parameters()]
    for protect in (-0.1, 1.0):
        with pytest.raises(MaskError, match="at least 0 and below 1"):
            ga.apply_subspace(model, protect=protect)
    with pytest.raises(MaskError, match="no singular directions"):
        ga.apply_subspace(model, include=["norm"])
    delta = ga.apply_mask(model, counted_mask(model))
    with pytest.raises(AttachError, match="a sparse delta already"):
        ga.apply_subspace(model)
    delta.remove()
    assert [p.requires_grad for p in model.parameters()] == flags
    subspace = ga.apply_subspace(model)
    with pytest.raises(AttachError, match="a subspace already"):
        ga.apply_subspace(model)
    optimizer = torch.optim.SGD(subspace.parameters(), lr=0.1)
    model.requires_grad_(False)
    with pytest.raises(TrainingError, match="was frozen"):
        optimizer.step()


def test_a_trainer_tunes_a_subspace_and_resumes_from_its_checkpoints(tmp_path: Path) -> None:
    def run(folder: Path, **resume: Any) -> ga.SelectiveTrainer:
        model, _ = tiny("llama", head="lm")
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
        data = {"train_dataset": examples(24), "eval_dataset": examples(8)}
        trainer = ga.SelectiveTrainer(model, arguments(folder, **settings), **data, subspace=0.5)
        trainer.train(**resume)
        return trainer

    straight = run(tmp_path / "a")
    report = straight.report()
    assert report.after["domain"] < report.before["domain"]
    assert straight.subspace is not None
    assert report.free == straight.subspace.params
    resumed = run(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert_same_bits(resumed.module, snapshot(straight.module))
    loaded, _ = tiny("llama", head="lm")
    ga.load_subspace(loaded, tmp_path / "a" / "checkpoint-6")
    assert_same_bits(loaded, snapshot(straight.module))
    with pytest.raises(TrainingError, match="takes the place of a mask"):
        ga.SelectiveTrainer(loaded, arguments(tmp_path), mask=counted_mask(loaded), subspace=0.5)
