"""A mixed batch: each example sees its own task's gates and head, through the Trainer and in plain calls."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import SOON, SPACE, Labelled, arguments, classifier, gated_classifier, labelled

import gatedadapters as ga
from gatedadapters.errors import TaskError, TrainingError
from gatedadapters.testing.backbones import tiny

CLASSES = {"a": 3, "b": 2, "c": 5}
SIZES, WIDTHS = [24, 8, 8], list(CLASSES.values())


def batch_of(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def train(
    folder: Path, *, model: Any = None, data: Any = None, temperature: float | None = None, **changes: Any
) -> Any:
    trainer = ga.GatedTrainer(
        model or gated_classifier(CLASSES),
        arguments(folder, **changes),
        schedule=SOON,
        train_dataset=Labelled(SIZES, WIDTHS) if data is None else data,
        budget=ga.Budget(fraction=0.4),
        task_temperature=temperature,
    )
    trainer.train()
    return trainer


def spy(model: Any) -> list[dict[str, Any]]:
    """What the model is called with, before any hook of the library takes something out."""
    calls: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda m, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True, prepend=True)
    return calls


def test_task_ids_reach_the_gates_and_heads_through_the_trainer(tmp_path: Path) -> None:
    model = gated_classifier(CLASSES)
    calls = spy(model)
    trainer = train(tmp_path, model=model, per_device_train_batch_size=8)
    assert all({"input_ids", "attention_mask", "labels", "task_ids"} <= call.keys() for call in calls)
    assert {int(i) for call in calls for i in call["task_ids"]} == {0, 1, 2}
    log_alpha = trainer.adapters.bank.log_alpha
    assert not torch.equal(log_alpha[0], log_alpha[1])
    assert trainer.adapters.structure.tasks == tuple(CLASSES)


def test_task_ids_are_kept_for_a_model_whose_forward_does_not_know_them(tmp_path: Path) -> None:
    model, _ = tiny("bert", head="classification")
    ga.attach(model, SPACE, tasks=("a", "b"))
    calls = spy(model)
    train(tmp_path, model=model, data=Labelled([16, 16]))
    assert all("task_ids" in call for call in calls)


def test_columns_that_only_the_backbone_knows_reach_it(tmp_path: Path) -> None:
    model = gated_classifier(CLASSES)
    calls = spy(model.backbone)
    rows = [row | {"token_type_ids": [0] * 4 + [1] * 4, "unknown": 1} for row in labelled(SIZES, WIDTHS)]
    train(tmp_path, model=model, data=rows, max_steps=2)
    assert all("token_type_ids" in call and "unknown" not in call for call in calls)


def test_each_example_goes_to_its_own_tasks_head() -> None:
    model = classifier(CLASSES).train()
    rows = labelled([2, 0, 2], WIDTHS)
    output = model(**batch_of(rows))
    assert output.logits.shape == (4, 5)
    hidden = model.backbone(**{k: v for k, v in batch_of(rows).items() if k in ("input_ids", "attention_mask")})
    pooled = hidden.last_hidden_state.mean(1)
    torch.testing.assert_close(output.logits[:2, :3], model.heads["a"](pooled[:2]))
    torch.testing.assert_close(output.logits[2:], model.heads["c"](pooled[2:]))
    assert (output.logits[:2, 3:] == torch.finfo(torch.float32).min).all()
    output.loss.backward()
    touched = {name: head.weight.grad is not None for name, head in model.heads.items()}
    assert touched == {"a": True, "b": False, "c": True}


def test_each_example_sees_its_own_tasks_gates() -> None:
    model = gated_classifier(CLASSES).eval()
    adapters = ga.get_adapters(model)
    with torch.no_grad():
        for path in adapters.paths.values():
            path.up.normal_(std=0.1)
        adapters.bank.log_alpha[1] = -4.0  # task b: everything closed
        mixed = model(**batch_of(labelled([2, 2, 2], WIDTHS))).logits
        for task, rows in enumerate((slice(0, 2), slice(2, 4), slice(4, 6))):
            alone = model(**batch_of(labelled([2, 2, 2], WIDTHS)[rows])).logits
            torch.testing.assert_close(mixed[rows], alone, rtol=0, atol=1e-5)
            with adapters.disabled():
                backbone = model(**batch_of(labelled([2, 2, 2], WIDTHS)[rows])).logits
            assert torch.allclose(mixed[rows], backbone, atol=1e-5) is (task == 1)


def test_one_tasks_structure_is_what_that_task_was(tmp_path: Path) -> None:
    trainer = train(tmp_path, max_steps=30)
    adapters, model = trainer.adapters, trainer.model.eval()
    structure = adapters.structure
    rows = batch_of(labelled([4, 4, 4], WIDTHS)[4:8])
    with torch.no_grad():
        before = model(**rows).logits
        alone = adapters.compact(task="b")
        assert adapters.tasks == ("b",)
        torch.testing.assert_close(model(**rows).logits, before, rtol=0, atol=1e-5)
        with pytest.raises(TaskError, match=r"task ids in 1 \(b\)"):  # not another task's head on these adapters
            model(**{**rows, "task_ids": torch.zeros(4, dtype=torch.long)})
    assert {p.key: p.units["b"] for p in alone.paths} == {
        p.key: p.units["b"] for p in structure.paths if "b" in p.units
    }


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a label outside its head": ({"task_ids": [0, 1], "labels": [2, 2]}, r"0\.\.1\n  got:      2\n.*task 'b', row \d"),
    "a negative label": ({"task_ids": [0, 1], "labels": [-1, 0]}, r"got:      -1\n.*task 'a', row 0"),
    "an unknown task": ({"task_ids": [0, 3], "labels": [0, 0]}, r"0\.\.2 \(a, b, c\)\s+got:      0\.\.3"),
    "a negative task": ({"task_ids": [-1, 0], "labels": [0, 0]}, r"got:      -1\.\.0"),
    "task ids that are no integers": ({"task_ids": [0.0, 1.0], "labels": [0, 0]}, "integer task ids"),
    "too few task ids": ({"task_ids": [0], "labels": [0, 0]}, r"shape \(2,\)"),
    "no task ids": ({"labels": [0, 0]}, r"task_ids among 0\.\.2 \(a, b, c\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_tasks_and_labels_are_named(name: str) -> None:
    change, message = BAD[name]
    model = gated_classifier(CLASSES)
    batch = {"input_ids": torch.full((2, 8), 5)} | {key: torch.tensor(value) for key, value in change.items()}
    with pytest.raises(TaskError, match=message):
        model(**batch)


@pytest.mark.parametrize("name", ["a label outside its head", "an unknown task"])
def test_wrong_data_stops_the_trainer_with_the_same_words(name: str, tmp_path: Path) -> None:
    change, message = BAD[name]
    rows = [{"input_ids": [5] * 8, "labels": change["labels"][i], "task_ids": change["task_ids"][i]} for i in (0, 1)]
    with pytest.raises(TaskError, match=message):
        train(tmp_path, data=rows, per_device_train_batch_size=2)


def test_task_ids_hold_for_their_call_only() -> None:
    model, batch = tiny("bert", head="classification")
    adapters = ga.attach(model, SPACE, tasks=("a", "b"))
    model(**batch, task_ids=torch.tensor([0, 1]))
    with pytest.raises(TaskError, match="the call does not say which"):
        model(**batch)
    adapters.set_task("b")
    model(**batch, task_ids=torch.tensor([0, 0]))
    with torch.no_grad():
        for path in adapters.paths.values():
            path.up.normal_(std=0.1)
        adapters.bank.log_alpha[0] = -4.0
    expected = model.eval()(**batch, task_ids=torch.tensor([1, 1])).logits
    torch.testing.assert_close(model(**batch).logits, expected)


@pytest.mark.parametrize("names", [("x.y", "x_y"), ("type", "train"), ("keys", "")])
def test_tasks_of_any_name_have_heads_of_their_own(names: tuple[str, str]) -> None:
    model = classifier({names[0]: 2, names[1]: 4})
    assert model.widths == [2, 4]
    assert [head.out_features for head in model.heads.values()] == [2, 4]
    assert len(set(model.state_dict())) == len(model.state_dict())


def test_a_task_needs_two_classes() -> None:
    for classes in ({}, {"a": 1}):
        with pytest.raises(TaskError, match="at least 2 classes"):
            ga.MultiTaskClassifier(tiny("bert")[0], classes)


# -- sampling across unequal tasks -------------------------------------------------------------------------------------


def seen_tasks(folder: Path, temperature: float | None, **changes: Any) -> list[list[int]]:
    model = gated_classifier(CLASSES)
    calls = spy(model)
    data = Labelled([48, 8, 8], WIDTHS)
    train(folder, model=model, data=data, temperature=temperature, per_device_train_batch_size=8, **changes)
    return [call["task_ids"].tolist() for call in calls]


def test_temperature_evens_out_unequal_tasks(tmp_path: Path) -> None:
    shares = {}
    for temperature in (None, 1.0, 1000.0):
        batches = seen_tasks(tmp_path, temperature, max_steps=8)
        shares[temperature] = Counter(task for batch in batches for task in batch)
    assert shares[None] == {0: 48, 1: 8, 2: 8}
    assert [shares[1.0][task] for task in range(3)] == pytest.approx([48, 8, 8], abs=3)
    assert [shares[1000.0][task] for task in range(3)] == pytest.approx([64 / 3] * 3, abs=3)


def test_sampling_goes_on_where_a_resumed_run_left_off(tmp_path: Path) -> None:
    """16 steps are two epochs, which draw differently; the checkpoint lies within the second."""
    changes = {"max_steps": 16, "save_strategy": "steps", "save_steps": 10}
    whole = seen_tasks(tmp_path, 2.0, **changes)
    assert whole[:8] != whole[8:]
    model = gated_classifier(CLASSES)
    calls = spy(model)
    trainer = ga.GatedTrainer(
        model,
        arguments(tmp_path / "2", per_device_train_batch_size=8, max_steps=16),
        schedule=SOON,
        train_dataset=Labelled([48, 8, 8], WIDTHS),
        budget=ga.Budget(fraction=0.4),
        task_temperature=2.0,
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert [call["task_ids"].tolist() for call in calls] == whole[10:]


def test_temperature_needs_the_sizes_of_the_tasks(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="`sizes`"):
        train(tmp_path, data=labelled(SIZES, WIDTHS), temperature=2.0)


def test_a_label_outside_the_head_of_a_transformers_classifier_is_named(tmp_path: Path) -> None:
    model, _ = tiny("bert", head="classification")
    ga.attach(model, SPACE)
    rows = [{"input_ids": [5] * 8, "labels": label} for label in (0, 70)]
    with pytest.raises(TaskError, match=rf"0\.\.{model.config.num_labels - 1}\n[\s\S]*70[\s\S]*optimiser step 0"):
        train(tmp_path, model=model, data=rows, per_device_train_batch_size=2)


def test_heads_stay_float32_over_a_bfloat16_backbone() -> None:
    backbone, _ = tiny("bert")
    model = ga.MultiTaskClassifier(backbone.to(torch.bfloat16), CLASSES)
    ga.attach(model, "encoder-mixed", tasks=model.tasks)
    model(**batch_of(labelled([2, 2, 2], WIDTHS))).loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.heads.parameters())


def test_a_head_may_be_any_module() -> None:
    """Of parameters in several layers, of buffers alone, of nothing; over a backbone of another precision."""
    backbone, _ = tiny("bert")
    model = ga.MultiTaskClassifier(backbone.to(torch.bfloat16), {"deep": 3, "fixed": 2, "slice": 5})
    width = backbone.config.hidden_size
    fixed = torch.nn.Linear(width, 2)
    for name, value in [(name, value.detach()) for name, value in fixed.named_parameters()]:
        delattr(fixed, name)
        fixed.register_buffer(name, value)
    heads = (torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)), fixed)
    for key, head in zip(model.heads, (*heads, torch.nn.AdaptiveAvgPool1d(5)), strict=True):
        model.heads[key] = head
    batch = batch_of(labelled([2, 2, 2], [3, 2, 5]))
    pooled = model.eval().pooled(batch["input_ids"], batch["attention_mask"])
    logits = model(**batch).logits
    for index, (head, rows) in enumerate(zip(model.heads.values(), pooled.split(2), strict=True)):
        wanted = head(rows if index == 2 else rows.float()).to(torch.bfloat16)
        torch.testing.assert_close(logits[2 * index : 2 * index + 2, : wanted.shape[1]], wanted)
