"""What people watch reaches the tracker that they use: W&B, MLflow, trackio."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

import gatedadapters as ga
from gatedadapters.inspection import StructureReporter
from gatedadapters.testing import tiny


def train(folder: Path, tracker: str, **settings: Any) -> ga.Adapters:
    """A short search that prunes, reported to `tracker`."""
    model, batch = tiny("llama", head="lm")
    adapters = ga.attach(model, "lora-all-linear", batch)
    row = {"input_ids": batch["input_ids"][0], "labels": batch["input_ids"][0]}
    ga.GatedTrainer(
        model,
        TrainingArguments(
            output_dir=str(folder / "checkpoints"),
            use_cpu=True,
            max_steps=6,
            per_device_train_batch_size=2,
            logging_steps=2,
            save_strategy="no",
            report_to=[tracker],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **settings,
        ),
        train_dataset=[row] * 8,
        budget=ga.Budget(fraction=0.25),
        schedule=ga.Schedule(warmup=0.0, ramp=0.3, prune=0.5),
        callbacks=[StructureReporter()],
    ).train()
    return adapters


def is_picture(image: Any) -> bool:
    values = np.asarray(image)
    return values.ndim == 3 and values.shape[2] in (3, 4) and values.std() > 0


@pytest.mark.parametrize("tracker", ["mlflow", "trackio", "wandb"])
def test_pictures_go_to_the_documented_functions(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, Any, int]] = []
    stand_in: Any = ModuleType(tracker)
    stand_in.Image = lambda values: values
    stand_in.log_image = lambda image, key, step: sent.append((key, image, step))
    stand_in.log = lambda values: sent.append((*next(iter(values.items())), values["train/global_step"]))
    monkeypatch.setitem(sys.modules, tracker, stand_in)
    reporter = StructureReporter()
    model, batch = tiny("llama", head="lm")
    adapters = ga.attach(model, "lora-all-linear", batch)
    state: Any = torch.nn.Module()
    control: Any = torch.nn.Module()
    settings: Any = torch.nn.Module()
    state.is_world_process_zero, state.global_step, control.should_training_stop = True, 3, False
    settings.report_to = [tracker]
    reporter.on_step_end(settings, state, control, model=model)
    assert not sent  # gates still learn
    adapters.prune(adapters.discretize(ga.Budget(fraction=0.25)))
    for _ in range(3):
        reporter.on_step_end(settings, state, control, model=model)
    ((tag, image, step),) = sent
    assert (tag, step) == ("structure/kept", 3)
    assert is_picture(image)


def test_mlflow_holds_scalars_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed; see the extra 'trackers'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    train(tmp_path, "mlflow")
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "gates/expected_params")
    assert [point.step for point in history] == [2, 4, 6]
    pictures = list((tmp_path / "runs").rglob("structure*kept*.png"))
    assert pictures
    assert is_picture(__import__("PIL.Image").Image.open(pictures[0]))


def test_trackio_holds_scalars_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed; see the extra 'trackers'")
    train(tmp_path, "trackio", run_name="search", project="gates")
    (run,) = trackio.Api().runs("gates")
    rows = import_module("trackio.sqlite_storage").SQLiteStorage.get_logs("gates", run.name)
    assert [row["train/global_step"] for row in rows if "train/gates/expected_params" in row] == [2, 4, 6]
    assert any("structure/kept" in row for row in rows)
    assert list((tmp_path / "trackio").rglob("*.png"))


def test_wandb_holds_scalars_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="W&B is not installed; see the extra 'trackers'")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    train(tmp_path, "wandb", run_name="search")
    wandb.finish()
    assert list((tmp_path / "wandb").rglob("structure/kept*.png"))
    (log,) = (tmp_path / "wandb").rglob("run-*.wandb")
    deadline = time.monotonic() + 60  # a process of W&B writes it, and may do so after `finish` has returned
    while b"gates/expected_params" not in log.read_bytes():
        assert time.monotonic() < deadline, log
        time.sleep(0.1)
