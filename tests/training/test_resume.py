"""A run resumed from a checkpoint is the run that was never stopped, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import SOON, SPACE, arguments, assert_same, gated_classifier, labelled, trained
from safetensors import safe_open
from safetensors.torch import load_file

import gatedadapters as ga
from gatedadapters.errors import TrainingError

CLASSES = {"a": 3, "b": 2}
PENALTIES: dict[str, Any] = {"budget": ga.Budget(fraction=0.3, per_task=0.25), "l0": ga.L0(weight=30.0)}


def run(folder: Path, penalty: Any, *, resume: Path | None = None, model: Any = None, **changes: Any) -> Any:
    """Dropout, mixed tasks, several epochs: everything that draws random numbers."""
    torch.manual_seed(99 if resume else 0)  # what a new process starts from
    model = model or gated_classifier(CLASSES, dropout=0.2)
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "weight_decay": 0.1, "warmup_steps": 2}
    trainer = ga.GatedTrainer(
        model,
        arguments(folder, **(settings | changes)),
        train_dataset=labelled([8, 8], [3, 2]),
        penalty=penalty,
        schedule=SOON,
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """Runs that were never stopped, one per penalty, and their folders."""
    runs: dict[str, tuple[Any, Path]] = {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in runs:
            folder = tmp_path_factory.mktemp(name)
            runs[name] = run(folder, PENALTIES[name]), folder
        return runs[name]

    return get


def everything(trainer: Any) -> dict[str, torch.Tensor]:
    bank, pressure = trainer.adapters.bank, trainer.adapters.pressure
    assert pressure.total_steps == 10
    states = trainer.optimizer.state_dict()["state"].items()
    moments = {f"{i}.{k}": v for i, s in states for k, v in s.items() if isinstance(v, torch.Tensor)}
    return trained(trainer.model) | moments | {"multipliers": pressure.multipliers, "saliency": bank.saliency}


@pytest.mark.parametrize("at", [2, 5, 6, 7, 8], ids=["in the warm-up", "just before", "at", "just after", "after"])
@pytest.mark.parametrize("name", PENALTIES)
def test_a_resumed_run_continues_bit_for_bit(name: str, at: int, whole: Any, tmp_path: Path) -> None:
    original, folder = whole(name)
    bank = original.adapters.bank
    assert bank.frozen
    assert int(bank.step) == 6
    resumed = run(tmp_path, PENALTIES[name], resume=folder / f"checkpoint-{at}")
    assert_same(everything(resumed), everything(original))
    assert resumed.adapters.structure == original.adapters.structure
    if at < 6:  # fixed gates draw none
        assert torch.equal(resumed.adapters.bank.noise, bank.noise)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (resumed, original)]
    assert losses[0] == losses[1]
    rates = [[g["lr"] for g in t.optimizer.param_groups] for t in (resumed, original)]
    assert rates[0] == rates[1]


def test_saliency_is_gathered_and_saved(whole: Any) -> None:
    original, folder = whole("budget")
    stored = load_file(folder / "checkpoint-4" / "model.safetensors")
    saliency = stored["gated_adapters.bank.saliency"]
    assert saliency.count_nonzero() > saliency.numel() / 2
    assert stored["gated_adapters.bank.gate_gradient"].count_nonzero() == 0
    assert original.adapters.bank.saliency.count_nonzero() > 0


def test_a_run_resumed_after_the_prune_compacts_to_the_same_artefact(whole: Any, tmp_path: Path) -> None:
    original, folder = whole("budget")
    resumed = run(tmp_path, PENALTIES["budget"], resume=folder / "checkpoint-8")
    structure = resumed.adapters.compact()
    assert structure == original.adapters.structure
    assert structure.budget == PENALTIES["budget"]


def test_checkpoints_hold_only_what_is_trained(whole: Any) -> None:
    original, folder = whole("budget")
    file = folder / "checkpoint-4" / "model.safetensors"
    with safe_open(file, "pt") as stored:
        keys = set(stored.keys())
    heads = {f"heads.{name}.{kind}" for name in CLASSES for kind in ("weight", "bias")}
    assert keys == {key for key in original.model.state_dict() if key.startswith("gated_adapters.")} | heads
    values = sum(p.numel() for p in original.model.parameters() if p.requires_grad)
    assert file.stat().st_size < 4 * values + 64 * 1024  # the backbone alone would take more
    assert sum(p.numel() for p in original.model.backbone.parameters()) * 4 > 64 * 1024
    assert not list((folder / "checkpoint-4").glob("*.part"))
    assert (folder / "checkpoint-4" / "optimizer.pt").stat().st_size < 3 * 4 * values + 64 * 1024


def wider(classes: dict[str, int] = CLASSES) -> Any:
    space = SPACE.model_copy(update={"paths": (SPACE.paths[0].resized(5),)})
    return gated_classifier(classes, space=space)


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "other ranks": (wider, r"bank\.beyond \(2, 36\) for \(2, 45\)"),
    "other places": (
        lambda: gated_classifier(CLASSES, space="attention-only"),
        r"bank\.beyond \(2, 36\) for \(2, 96\)",
    ),
    "other tasks": (lambda: gated_classifier({"a": 3, "c": 2}), r"heads\.b"),
    "more classes": (lambda: gated_classifier({"a": 4, "b": 2}), r"heads\.a\.bias \(3,\) for \(4,\)"),
    "another backbone": (lambda: gated_classifier(CLASSES, seed=1), "values of another backbone"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_other_adapters_is_refused_and_nothing_is_changed(
    name: str, whole: Any, tmp_path: Path
) -> None:
    _, folder = whole("budget")
    build, found = OTHERS[name]
    model = build()
    before = trained(model)
    with pytest.raises(TrainingError, match=found) as caught:
        run(tmp_path, PENALTIES["budget"], model=model, resume=folder / "checkpoint-4")
    assert "checkpoint-4" in str(caught.value)
    after = trained(model)
    assert_same({key: after[key] for key in before}, before)


def test_a_truncated_checkpoint_is_refused(whole: Any, tmp_path: Path) -> None:
    _, folder = whole("budget")
    copy = tmp_path / "checkpoint-4"
    shutil.copytree(folder / "checkpoint-4", copy)
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TrainingError, match="cannot be read"):
        run(tmp_path, PENALTIES["budget"], resume=copy)


def test_loading_a_state_dict_decides_whether_there_is_a_structure(whole: Any) -> None:
    original, folder = whole("budget")
    model = gated_classifier(CLASSES)
    adapters = ga.get_adapters(model)
    adapters.set_penalty(PENALTIES["budget"], total_steps=10)
    for at, is_pruned in ((8, True), (4, False)):
        model.load_state_dict(load_file(folder / f"checkpoint-{at}" / "model.safetensors"), strict=False)
        assert adapters.bank.frozen is is_pruned
        assert adapters.structure == (original.adapters.structure if is_pruned else None)


def cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(share * len(data))])

    return damage


def flipped(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return damage


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def written(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        *(cut(name, share) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth") for share in (0, 0.5, 0.99)),
        *(cut("trainer_state.json", share) for share in (0, 0.5)),
        *(flipped(name) for name in ("optimizer.pt", "rng_state.pth")),
        *(without(name) for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json", "model.safetensors")),
        *(written("trainer_state.json", text) for text in ("[]", '{"a": 1}', "[" * 5000, "null")),
    ],
)
def test_a_checkpoint_with_a_damaged_file_is_refused_and_nothing_is_changed(
    damage: Callable[[Path], None], whole: Any, tmp_path: Path
) -> None:
    _, folder = whole("budget")
    copy = tmp_path / "checkpoint-4"
    shutil.copytree(folder / "checkpoint-4", copy)
    damage(copy)
    model = gated_classifier(CLASSES)
    before = trained(model)
    with pytest.raises(TrainingError, match=r"(?s)checkpoint.*where:.*checkpoint-4.*fix:"):
        run(tmp_path, PENALTIES["budget"], model=model, resume=copy)
    after = trained(model)
    assert_same({key: after[key] for key in before}, before)


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"(?s)no checkpoint.*no such folder.*nowhere"):
        run(tmp_path, PENALTIES["budget"], resume=tmp_path / "nowhere")


def test_a_checkpoint_holds_no_token(tmp_path: Path) -> None:
    run(tmp_path, PENALTIES["budget"], hub_token="hf_MARKEDmarkedMARKED", max_steps=1)
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or b"MARKEDmarked" not in file.read_bytes(), file
