"""A probe leaves no trace, goes on where it stopped, and measures what it says."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import PROBE, classifier, moved, rows, state, tasks
from torch.nn import functional as F

import gatedadapters as ga
from gatedadapters.config import ProbeConfig
from gatedadapters.continual import fitting, probing
from gatedadapters.continual.fitting import Recipe
from gatedadapters.continual.probing import BatchFisher
from gatedadapters.errors import ArtifactError, ConfigError
from gatedadapters.masking import score

CONFIG = ProbeConfig(**{**PROBE, "steps": 4, "dtype": "float32"})
HEADS = frozenset(f"heads.{name}.{part}" for name in "abc" for part in ("weight", "bias"))
OWN = frozenset(name for name in HEADS if name.startswith("heads.a."))
RECIPE = Recipe(1, 1, 1.0, use_cpu=True, checkpoint_steps=1)


def probed(model: Any, folder: Path, **changes: Any) -> ga.continual.Probe:
    given: dict[str, Any] = {"heads": HEADS, "own_head": OWN, "recipe": RECIPE}
    return ga.probe(model, tasks()[0], folder, CONFIG, **(given | changes))


def test_every_bit_and_flag_of_the_model_is_as_before(tmp_path: Path) -> None:
    model = classifier()
    model.backbone.embeddings.requires_grad_(False)
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    found = probed(model, tmp_path / "probe")
    assert not moved(before, state(model))
    assert flags == [p.requires_grad for p in model.parameters()]
    assert not any(p.grad is not None for p in model.parameters())
    assert not (tmp_path / "probe.running").exists()
    assert not any(name.startswith("heads.") for name in found.names)
    assert sum(found.record.norms.values()) > 0
    assert {f.name for f in (tmp_path / "probe").iterdir()} == {"probe.json", "deltas.safetensors"}


def test_deltas_are_what_the_run_moved_and_their_norms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm: dict[str, Any] = {}
    original = fitting.StageTrainer.train

    def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(trainer, *args, **kwargs)
        warm.update(state(trainer.model))
        return result

    monkeypatch.setattr(fitting.StageTrainer, "train", train)
    model = classifier()
    before = state(model)
    found = probed(model, tmp_path / "probe")
    for name in found.names:
        change = warm[name] - before[name]
        assert torch.equal(found.delta(name), change)
        assert found.record.norms[name] == pytest.approx(float(torch.linalg.vector_norm(change.double())))
    assert float((warm["heads.a.weight"] - before["heads.a.weight"]).abs().max()) > 0
    assert torch.equal(warm["heads.b.weight"], before["heads.b.weight"])


def test_a_stopped_probe_goes_on_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = probed(classifier(), tmp_path / "whole")
    original, calls = fitting.StageTrainer.training_step, []

    def step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(fitting.StageTrainer, "training_step", step)
    model = classifier()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        probed(model, tmp_path / "stopped")
    assert not moved(before, state(model))
    with pytest.raises(ArtifactError, match="another probe"):  # nor one that has other settings
        probed(model, tmp_path / "stopped", seed=1)
    assert len(calls) == 3
    found = probed(model, tmp_path / "stopped")
    assert len(calls) == 3 + 2  # the first two steps are not made again
    assert found.record.norms == whole.record.norms
    assert found.record.fisher == whole.record.fisher
    again = probed(model, tmp_path / "stopped")  # a finished one is read
    assert len(calls) == 5
    assert again.record == found.record
    with pytest.raises(ArtifactError, match="another probe"):
        probed(classifier(seed=1), tmp_path / "stopped")


def test_a_probe_of_other_data_heads_or_elements_is_not_taken_for_this_one(tmp_path: Path) -> None:
    model, task = classifier(), tasks()[0]
    first = probed(model, tmp_path / "probe")
    others = dataclasses.replace(task, train=rows(0, 3, 12, seed=9))
    given: dict[str, Any] = {"heads": HEADS, "own_head": OWN, "recipe": RECIPE}
    for one, change, word in (
        (others, {}, "task.data"),
        (task, {"heads": OWN}, "heads"),
        (task, {"own_head": frozenset()}, "own_head"),
        (task, {"elements": True}, "elements"),
        (task, {"recipe": dataclasses.replace(RECIPE, head_learning_rate=0.5)}, "training.head_learning_rate"),
    ):
        with pytest.raises(ArtifactError, match=f"another probe: its {word} differs"):
            ga.probe(model, one, tmp_path / "probe", CONFIG, **(given | change))
    assert probed(model, tmp_path / "probe").record == first.record


def test_the_seconds_of_a_probe_are_those_of_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(2)
        return score(*args, **kwargs)

    monkeypatch.setattr(probing, "score", slow)
    monkeypatch.setattr(probing, "fit", lambda *args, **kwargs: None)
    assert probed(classifier(), tmp_path / "probe").record.seconds >= 2


def test_what_a_killed_process_left_of_a_probe_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".probe.0123abcd", "probe.running"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(probing, "fit", lambda *args, **kwargs: None)
    probed(classifier(), tmp_path / "probe")
    assert [path.name for path in tmp_path.iterdir()] == ["probe"]
    (tmp_path / "probe.running").mkdir()  # killed between the result and the removal of what led to it
    probed(classifier(), tmp_path / "probe")
    assert [path.name for path in tmp_path.iterdir()] == ["probe"]


def test_squared_gradients_are_those_of_batches_in_double_precision() -> None:
    model = classifier(dropout=0.0).double()
    task = tasks()[0]
    batches = [task.collate(task.train[i : i + 2]) for i in (0, 2, 4)]
    found = score(model, batches, kind=BatchFisher(), heads=sorted(HEADS))
    name = "backbone.encoder.layer.1.output.dense.weight"
    weight = model.get_parameter(name)
    expected = torch.zeros_like(weight)
    for batch in batches:
        loss = F.cross_entropy(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
        expected += torch.autograd.grad(loss, weight)[0] ** 2 / len(batches)
    torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize("kind", ["training", "gradient"])
@pytest.mark.parametrize("bf16", [False, True])
def test_gradients_are_taken_in_the_precision_of_the_training(kind: str, bf16: bool, tmp_path: Path) -> None:
    model = classifier()
    seen: list[torch.dtype] = []
    linear = model.backbone.encoder.layer[1].output.dense
    linear.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    steps = {} if kind == "gradient" else {"steps": 2, "batch_size": 2}
    config = ProbeConfig(kind=kind, fisher_batches=2, **steps)
    found = ga.probe(
        model,
        tasks()[0],
        tmp_path / "probe",
        config,
        heads=HEADS,
        own_head=OWN,
        recipe=dataclasses.replace(RECIPE, bf16=bf16),
    )
    assert set(seen[-2:]) == {
        torch.bfloat16 if bf16 else torch.float32
    }  # the two batches; before them the layout is found
    assert all(value > 0 for value in found.record.fisher.values())


def test_few_batches_are_averaged_over_those_that_ran(tmp_path: Path) -> None:
    model, task = classifier(dropout=0.0), tasks()[0]  # 12 examples: 6 batches of 2
    few, many = (
        ga.probe(
            model,
            task,
            tmp_path / str(count),
            CONFIG.model_copy(update={"fisher_batches": count}),
            heads=HEADS,
            own_head=OWN,
            recipe=RECIPE,
        )
        for count in (6, 150)
    )
    assert few.record.fisher == many.record.fisher


def test_an_epoch_sees_every_example(tmp_path: Path) -> None:
    config = ProbeConfig(epochs=1.0, batch_size=8, fisher_batches=1)  # 12 examples
    assert ga.probe(classifier(), tasks()[0], tmp_path / "probe", config, heads=HEADS, own_head=OWN).record.steps == 2


def test_updates_are_stored_in_two_bytes_an_element(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"dtype": "bfloat16", "fraction": 0.5})
    found = ga.probe(classifier(), tasks()[0], tmp_path / "probe", config, heads=HEADS, own_head=OWN, recipe=RECIPE)
    elements = sum(found.delta(name).numel() for name in found.names)
    assert (tmp_path / "probe" / "deltas.safetensors").stat().st_size < 2 * elements + 8192
    assert found.record.examples == 6
    exact = json.loads((tmp_path / "probe" / "probe.json").read_text())["norms"]
    stored = {name: float(found.delta(name).double().norm()) for name in found.names}
    assert stored == pytest.approx(exact, rel=4e-3)
    with pytest.raises(ArtifactError, match="no squared gradients"):
        found.squared_gradients()


def by_gradients(model: Any, folder: Path, **changes: Any) -> ga.continual.Probe:
    config = ProbeConfig(kind="gradient", fisher_batches=3, dtype="float32")
    return ga.probe(model, tasks()[0], folder, config, heads=HEADS, own_head=OWN, recipe=RECIPE, **changes)


def test_gradients_are_probed_without_a_step_and_are_those_of_the_model_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "fit", lambda *args, **kwargs: pytest.fail("a step was taken"))
    seen: list[Any] = []
    original = probing._fisher_batches
    monkeypatch.setattr(probing, "_fisher_batches", lambda *a: iter(seen.extend(found := list(original(*a))) or found))
    model = classifier()  # with dropout, which must be off
    before, flags, modes = (
        state(model),
        [p.requires_grad for p in model.parameters()],
        [m.training for m in model.modules()],
    )
    found = by_gradients(model, tmp_path / "probe", elements=True)
    assert not moved(before, state(model))
    assert flags == [p.requires_grad for p in model.parameters()]
    assert modes == [m.training for m in model.modules()]
    assert [path.name for path in tmp_path.iterdir()] == ["probe"]
    assert (found.record.steps, found.record.examples, len(seen)) == (0, 6, 3)
    model.eval()
    names = list(found.names)
    gradients = []
    for batch in seen:
        loss = F.cross_entropy(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
        gradients.append(torch.autograd.grad(loss, [model.get_parameter(n) for n in names], allow_unused=True))
    squares = found.squared_gradients()
    for name, *own in zip(names, *gradients, strict=True):
        stacked = torch.stack([torch.zeros_like(before[name]) if grad is None else grad for grad in own])
        torch.testing.assert_close(found.delta(name), -stacked.mean(0))
        torch.testing.assert_close(squares[name], (stacked**2).mean(0))
        assert found.record.norms[name] == pytest.approx(float(stacked.mean(0).norm()), rel=1e-4)


def test_cores_are_selected_from_gradients_as_from_trainings(tmp_path: Path) -> None:
    model = classifier()
    infos = ga.continual.tensors_of(model, HEADS)
    probes = [by_gradients(model, tmp_path / "probe", elements=True)]
    for granularity in ("tensor", "element"):
        core = ga.continual.select_core(infos, probes, 0, granularity=granularity, share=0.2)
        assert 0 < core.elements < sum(info.numel for info in infos.values())


def test_gradients_refuse_the_options_of_a_training() -> None:
    with pytest.raises(ConfigError, match="takes no step, leave learning_rate, steps out"):
        ProbeConfig(kind="gradient", steps=3, learning_rate=1e-3)


def test_trainings_are_recorded_as_earlier_releases_did() -> None:
    assert "kind" not in ProbeConfig().model_dump(mode="json")
    assert ProbeConfig(kind="gradient").model_dump(mode="json")["kind"] == "gradient"
