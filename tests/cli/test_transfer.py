"""The transfer command, from a configuration to what lies in the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

import gatedadapters as ga
from gatedadapters.cli import main
from gatedadapters.experiments import base_pair
from gatedadapters.experiments.arms import ArmRunner
from gatedadapters.experiments.base_pair import BasePair, WeighBySensitivity
from gatedadapters.transfer.sensitivity import weigh_by


@pytest.fixture
def update(encoder: Path, tmp_path: Path) -> Path:
    """The encoder after an update: the same but for noise on its feed-forward weights."""
    folder = tmp_path / "update"
    shutil.copytree(encoder, folder)
    model = AutoModel.from_pretrained(encoder)
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.output.dense.weight.add_(0.05 * torch.randn_like(layer.output.dense.weight))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def transfer(tables: Path, encoder: Path, update: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        data = {
            "model": str(encoder),
            "update": str(update),
            "tasks": [{"train": "mood.csv"}],
            "seeds": [0, 1],
            "training": {"steps": 4, "batch_size": 4, "precision": "fp32", "device": "cpu", "max_length": 16},
        }
        path = tables / "transfer.yaml"
        path.write_text(yaml.safe_dump(data | changes))
        return path

    return write


def test_transfer_writes_table_picture_numbers_and_adapters(
    transfer: Callable[..., Path],
    update: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    width: Callable[[Path], int],
) -> None:
    out = tmp_path / "out"
    assert main(["transfer", str(transfer()), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "transfer-trained" in printed
    assert "recovery" in printed
    data = json.loads((out / "metrics.json").read_text())
    assert [score["seed"] for score in data["scores"]] == [0, 1]
    arms = ["carried as it is", *(f"repaired, 1 steps, {how}" for how in ("labels", "no labels"))]
    assert list(data["repairs"]) == [*arms, "trained anew, 1 steps", "trained anew"]
    assert all(len(arm["scores"]) == 2 for arm in data["repairs"].values())
    direct, anew = (data["repairs"][name]["scores"] for name in ("carried as it is", "trained anew"))
    assert [score["accuracy"] for score in direct] == [score["direct"] for score in data["scores"]]
    assert [score["loss"] for score in anew] == [score["retuned"] for score in data["losses"]["scores"]]
    assert all(found["value"] > 0 for found in data["predicted_damage"])
    assert "predicted damage" in printed
    shifts = {point["module"]: point["shift"] for point in data["shift"]}
    assert shifts["encoder.layer.0.attention.self.query"] == 0
    assert shifts["encoder.layer.0.output.dense"] > 0
    assert width(out / "shift.png") > 300
    assert (out / "table.txt").read_text().strip() in printed
    model = ga.MultiTaskClassifier(AutoModel.from_pretrained(update), {"mood": 2})
    carried = ga.load_adapters(model, out / "transfer-trained", base="updated")
    assert carried.structure is not None
    assert len(carried.structure.lineage) == 1
    assert main(["transfer", str(out / "transfer.yaml"), "--out", str(out)]) == 2  # its own results are in the way


def test_a_given_adapter_is_tested_as_it_is_and_its_structure_trained(
    transfer: Callable[..., Path], configured: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every training begins with the head that the seed gives, whatever was tested or trained before it."""
    begun: list[torch.Tensor] = []
    train = ArmRunner.train

    def watched(self: ArmRunner, *args: Any, **options: Any) -> float:
        begun.append(next(iter(self.model.heads.parameters())).detach().clone())
        return train(self, *args, **options)

    assert main(["search", str(configured(tasks=[{"train": "mood.csv"}])), "--out", str(tmp_path / "searched")]) == 0
    adapter = tmp_path / "searched" / "adapter"
    out = tmp_path / "out"
    monkeypatch.setattr(ArmRunner, "train", watched)
    assert main(["transfer", str(transfer(adapter=str(adapter), seeds=[0])), "--out", str(out)]) == 0
    assert len(begun) == 4  # without and with weakening, and anew with all and with few steps
    assert all(torch.equal(head, begun[0]) for head in begun)
    data = json.loads((out / "metrics.json").read_text())
    saved = json.loads((tmp_path / "searched" / "metrics.json").read_text())["arms"][0]["mean"]
    assert data["given_adapter"][0] == pytest.approx(saved)
    assert ga.Structure.load(out / "adapter").paths == ga.Structure.load(adapter).paths


def test_the_transfer_trained_search_alone_prefers_what_transfers(
    transfer: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["transfer", str(transfer(prefer_transferable=True)), "--out", str(tmp_path / "out")]) == 2
    assert "it needs search: true" in capsys.readouterr().err
    seen: list[tuple[bool, bool, bool]] = []
    plain = BasePair.train

    def watched(bases: Any, model: Any, progress: Any) -> Any:
        adapters = plain(bases, model, progress)
        weak = any(type(h).__name__ == "Draw" for m in model.modules() for h in m._forward_pre_hooks.values())
        seen.append(
            (model is bases.old, weak, any(isinstance(c, WeighBySensitivity) for c in bases.runners[0].callbacks))
        )
        return adapters

    weighed: list[dict[str, float]] = []
    monkeypatch.setattr(BasePair, "train", watched)
    monkeypatch.setattr(
        base_pair, "weigh_by", lambda adapters, found: weighed.append(found) or weigh_by(adapters, found)
    )
    config = transfer(prefer_transferable=True, search=True, budget={"fraction": 0.3}, seeds=[0], repair=[])
    assert main(["transfer", str(config), "--out", str(tmp_path / "out")]) == 0
    assert seen == [(True, False, False), (True, True, True), (False, False, False)]
    assert len(weighed) == 1
    by_place = {key: value for key, value in weighed[0].items() if "/layer/0/attention/self/query" in key}
    assert by_place
    assert not any(by_place.values())  # nothing before the first feed-forward sub-layer hangs on one
    assert max(weighed[0].values()) > 0


def test_another_vocabulary_is_refused_by_name(
    transfer: Callable[..., Path], update: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = json.loads((update / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["dog"], words["cat"] = words["cat"], words["dog"]
    (update / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert AutoTokenizer.from_pretrained(update).get_vocab()["dog"] == words["dog"]
    assert main(["transfer", str(transfer()), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "the vocabulary differs" in said
    assert "'dog' is not the same" in said or "'cat' is not the same" in said
    assert not (tmp_path / "out").exists()
