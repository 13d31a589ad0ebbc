"""Streams that are refused before any compute: folders of others, bad tasks, strategies and models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import RESUMED, TRAINING, classifier, collate, interrupted, moved, rows, run, state, tasks
from transformers import TrainingArguments

import gatedadapters as ga
from gatedadapters.config import SearchSpace
from gatedadapters.continual import check_stream
from gatedadapters.continual.measures import exact_match, nearest_class
from gatedadapters.errors import (
    ArtifactError,
    AttachError,
    ConfigError,
    DataError,
    GatedAdaptersError,
    MaskError,
    TaskError,
    TrainingError,
)


def other_order() -> list[ga.Task]:
    return tasks()[::-1]


def other_data() -> list[ga.Task]:
    return tasks(train=rows(1, 2, 12, seed=7))


def other_measure() -> list[ga.Task]:
    return tasks(measure=exact_match)


def no_labels(size: int, *, seed: int) -> list[dict[str, Any]]:
    return [{("label" if k == "labels" else k): v for k, v in row.items()} for row in rows(1, 2, size, seed=seed)]


class Endless(torch.utils.data.IterableDataset[Any]):
    """Has no length."""

    def __iter__(self) -> Iterator[Any]:
        yield from rows(0, 3, 12, seed=0)


def with_general(**changes: Any) -> ga.TaskStream:
    given = vars(tasks()[0]) | {"name": "general", "classes": (), "heads": (), "measure": nearest_class} | changes
    return ga.TaskStream(tasks(), ga.Task(**given))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"given": other_order()}, "other tasks, or in another order"),
        ({"given": other_data()}, r"other tasks, or in another order(.|\n)*tasks\[1\]\.data"),
        ({"given": other_measure()}, r"(.|\n)*tasks\[1\]\.measure"),
        ({"training": TRAINING.model_copy(update={"steps": 5})}, "other training"),
        ({"strategy": "ewc"}, "other strategy"),
        ({"model": classifier(seed=1)}, "other weights"),
    ],
    ids=["order", "data", "measure", "training", "strategy", "base"],
)
def test_a_folder_of_another_stream_is_refused(change: dict[str, Any], message: str, finished: Any) -> None:
    _, result = finished("sequential")
    given = {"model": classifier(), "given": tasks(), "strategy": "sequential", "training": RESUMED} | change
    before = state(given["model"])
    with interrupted(at=1), pytest.raises(ArtifactError, match=message):
        ga.run_stream(
            given["model"], given["given"], given["strategy"], training=given["training"], folder=result.folder
        )
    assert not moved(before, state(given["model"]))


def test_a_folder_with_files_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="files of others"):
        run(classifier(), "sequential", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


BAD: dict[str, tuple[Callable[[], Any], type[GatedAdaptersError], str]] = {
    "no task": (list, TaskError, "a stream needs tasks"),
    "duplicate names": (lambda: tasks(name="a"), TaskError, "two tasks have one name"),
    "one class": (lambda: tasks(classes=("x",)), TaskError, "a task has one class"),
    "one class in the data": (
        lambda: tasks(train=[row | {"labels": 0} for row in rows(1, 2, 12, seed=0)]),
        TaskError,
        "has one class",
    ),
    "a label outside": (lambda: tasks(train=rows(1, 4, 12, seed=0)), DataError, "outside the task's classes"),
    "no training data": (lambda: tasks(train=[]), DataError, "no training data"),
    "no labels in training": (lambda: tasks(train=no_labels(12, seed=0)), DataError, "training data has no label"),
    "no labels in evaluation": (lambda: tasks(held_out=no_labels(10, seed=1)), DataError, "evaluation data has no lab"),
    "a held-out label outside": (lambda: tasks(held_out=rows(1, 7, 10, seed=1)), DataError, "outside the task's class"),
    "data without a length": (lambda: tasks(train=Endless()), DataError, "cannot be indexed"),
    "general task that nothing is known of": (lambda: with_general(train=[]), DataError, "no training data"),
    "general task without labels": (
        lambda: with_general(held_out=no_labels(4, seed=0)),
        DataError,
        "evaluation data has no label",
    ),
    "no evaluation data": (lambda: tasks(held_out=[]), DataError, "no evaluation data"),
    "colliding label spaces": (lambda: tasks(heads=("heads.a",)), TaskError, "do not fit|collide"),
    "colliding label spaces of one size": (
        lambda: tasks(heads=("heads.a",), classes=("u", "v", "w")),
        TaskError,
        "label spaces collide",
    ),
    "the model's one head": (
        lambda: [ga.Task(**{**vars(task), "heads": ()}) for task in tasks()],
        TaskError,
        "label spaces collide|fit",
    ),
    "no such head": (lambda: tasks(heads=("heads.z",)), AttachError, "heads.z"),
    "classes not named": (lambda: tasks(classes=(), heads=()), TaskError, "does not name its classes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tasks_are_refused_before_any_compute(name: str) -> None:
    build, error, message = BAD[name]
    model = classifier()
    before = state(model)
    with interrupted(at=1), pytest.raises(error, match=message):
        ga.run_stream(model, build(), "sequential", training=TRAINING)
    assert not moved(before, state(model))


@pytest.mark.parametrize(
    ("strategy", "error", "message"),
    [
        ({"kind": "cosine", "probe": {"start": "current"}}, ConfigError, "different models"),
        ({"kind": "l2_fisher", "core": {"share": 0.5, "overlap": "exclude_previous"}}, ConfigError, "do not fit into"),
        (
            {"kind": "l2_fisher", "core": {"include": ["*.word_*"], "share": 0.1, "overlap": "exclude_previous"}},
            ConfigError,
            "1 of 1 tensors a task",
        ),
        ({"kind": "l2_fisher", "core": {"exclude": ["boas"]}}, MaskError, "'boas'"),
        ({"kind": "carried", "source": "x", "core": {"share": 0.2}}, ConfigError, "not selected anew"),
        ({"kind": "random", "elements": [1, 2]}, ConfigError, "3 numbers"),
        ({"kind": "gated", "space": "encoder-mixed"}, ConfigError, "merged into the weights"),
        ({"kind": "carried", "source": "/nowhere"}, ArtifactError, "not a finished stream"),
        ("none such", ConfigError, "no such strategy"),
        ({"kind": "ewc", "wieght": 3}, ConfigError, "wieght"),
        ({"kind": "per_task", "space": "none-such"}, ConfigError, "none-such"),
    ],
)
def test_bad_strategies_are_refused_before_any_compute(strategy: Any, error: Any, message: str) -> None:
    with interrupted(at=1), pytest.raises(error, match=message):
        ga.run_stream(classifier(), tasks(), strategy, training=TRAINING)


@pytest.mark.parametrize("check", [check_stream, ga.run_stream])
def test_a_check_that_fails_leaves_neither_files_nor_another_model(check: Any, tmp_path: Path) -> None:
    model, more = classifier(), {"folder": tmp_path / "stream"} if check is ga.run_stream else {}
    before = state(model)
    with pytest.raises(ConfigError, match="3 numbers"):
        check(model, tasks(), {"kind": "random", "elements": [1, 2]}, training=TRAINING, **more)
    assert not moved(before, state(model))
    assert not (tmp_path / "stream").exists()


@pytest.mark.parametrize("kind", ["replay", "joint"])
def test_batches_of_other_kinds_are_not_mixed(kind: str) -> None:
    def marked(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {**collate(items), "task_ids": torch.ones(len(items), dtype=torch.long)}

    with interrupted(at=1), pytest.raises(TaskError, match="batches of different kinds"):
        ga.run_stream(classifier(), tasks(collate=marked), kind, training=TRAINING)


def test_several_processes_or_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with interrupted(at=1), pytest.raises(ConfigError, match="one process"):
        ga.run_stream(classifier(), tasks(), "sequential", training=TRAINING)
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with interrupted(at=1), pytest.raises(TrainingError, match="DataParallel"):
        ga.run_stream(classifier(), tasks(), "sequential", training=TRAINING)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    training = TRAINING.model_copy(update={"device": "cuda"})
    with interrupted(at=1), pytest.raises(ConfigError, match="CUDA device"):
        ga.run_stream(classifier(), tasks(), "sequential", training=training)


def test_cosine_with_one_task_is_refused() -> None:
    with interrupted(at=1), pytest.raises(TaskError, match="two tasks or more"):
        ga.run_stream(classifier(), tasks()[:1], "cosine", training=TRAINING)


def test_a_model_with_adapters_or_a_delta_is_refused() -> None:
    model = classifier()
    ga.attach(model, SearchSpace.load("lora-all-linear"), tasks=model.tasks)
    with pytest.raises(AttachError, match="already has adapters"):
        run(model, "sequential")
    ga.detach(model)
    ga.apply_mask(
        model, ga.Mask.build(model, {"backbone.encoder.layer.0.output.dense.bias": torch.arange(3)}), heads=()
    )
    with pytest.raises(AttachError, match="sparse delta"):
        run(model, "sequential")
