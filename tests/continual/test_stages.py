"""What a stage reports and leaves behind: bytes, names, seconds, flags, hidden folders, devices."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import PROBE, TRAINING, classifier, collate, options, run, tasks

import gatedadapters as ga
from gatedadapters.continual.core import random_core
from gatedadapters.continual.measures import exact_match
from gatedadapters.continual.result import CHANGE, MEMORY, stage_folder
from gatedadapters.continual.runner import StreamRunner
from gatedadapters.continual.stage import Stage
from gatedadapters.continual.states import Change
from gatedadapters.continual.strategies import probed, resolve


def moving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training add one to all that is trained."""

    def fit(self: Stage, **kwargs: Any) -> float:
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
        return 0.0

    monkeypatch.setattr(Stage, "fit", fit)


def test_bytes_are_those_of_the_stage_alone_where_only_the_last_state_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving(monkeypatch)
    given = {"elements": [100, 200, 300], "core": {"granularity": "element"}}
    kept = run(classifier(), "random", tmp_path / "kept", **given)
    last = ga.run_stream(
        classifier(), tasks(), options("random", **given), training=TRAINING, folder=tmp_path / "last", keep=False
    )
    assert [stage.bytes for stage in last.stages] == [stage.bytes for stage in kept.stages]
    assert [stage.state for stage in last.stages] == [stage.state for stage in kept.stages]
    assert Change.load(stage_folder(tmp_path / "last", 2) / CHANGE).nbytes > last.stages[2].bytes


def test_a_stream_of_one_task_names_it(untrained: None) -> None:
    assert [s.task for s in ga.run_stream(classifier(), tasks()[:1], "sequential", training=TRAINING).stages] == ["a"]
    assert [s.task for s in run(classifier(), "joint").stages] == ["all tasks"]


def test_under_adapters_that_stay_the_backbone_stays_frozen(untrained: None) -> None:
    model = classifier()
    model.heads["b"].bias.requires_grad_(False)
    run(model, "lora")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not any(flag for name, flag in flags.items() if name.startswith("backbone.") and "gated" not in name)
    assert [flags[f"heads.{name}.bias"] for name in "abc"] == [True, False, True]
    assert all(p.requires_grad for p in ga.get_adapters(model).weight_parameters())


def test_exclusive_random_tensors_last_for_all_tasks(untrained: None) -> None:
    """Each takes a part of one tensor, which the next used to leave out as a whole."""
    result = run(classifier(), "random", core={"share": 0.333, "overlap": "exclude_previous"})
    size = result.record.elements
    assert [stage.elements for stage in result.stages] == [round(0.333 * size)] * 3
    halves = run(classifier(), "random", elements=[size - 20, 10, 10], core={"overlap": "exclude_previous"})
    assert [stage.elements for stage in halves.stages] == [size - 20, 10, 10]
    with pytest.raises(ga.errors.ConfigError, match="do not fit into the model"):
        run(classifier(), "random", elements=[size - 20, 10, 11], core={"overlap": "exclude_previous"})


def test_the_report_of_a_restricted_core_is_of_the_whole_backbone(tmp_path: Path, untrained: None) -> None:
    core = {"granularity": "element", "share": 0.5, "include": ["*.attention.*"]}
    result = run(classifier(), "random", tmp_path / "stream", core=core)
    share = result.stages[0].elements / result.record.elements
    assert share < 0.4
    assert all(found.element_share == pytest.approx(share) for _, found in result.cores())
    assert f"({share:.3%})" in result.stages[0].report


@pytest.mark.parametrize("start", ["base", "current"])
def test_seconds_of_probing_and_choosing_are_added(
    start: str, untrained: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, names = classifier().get_parameter("backbone.embeddings.word_embeddings.weight").numel(), []

    class Stored:
        class record:  # noqa: N801
            seconds = 5.0

    def select(infos: Any, probes: Any, at: int, *, kind: str, candidates: Any, **options: Any) -> Any:
        assert isinstance(probes[at], Stored)
        names.append(kind)
        time.sleep(0.3)
        return random_core(infos, size, seed=0, candidates=candidates)

    monkeypatch.setattr(Stage, "probe", lambda *args, **kwargs: Stored())
    monkeypatch.setattr(probed.Probe, "load", lambda *args: Stored())
    monkeypatch.setattr(probed, "select_core", select)
    result = run(classifier(), "l2_fisher", probe={**PROBE, "start": start})
    assert names == ["l2_fisher"] * 3
    assert all(5.3 <= stage.probe_seconds < 60 for stage in result.stages)


def test_what_merged_paths_touch_is_reported(finished: Any) -> None:
    for kind in ("gated", "o_lora"):
        _, result = finished(kind)
        cores = dict(result.cores())
        assert list(cores) == ["a", "b", "c"]
        for index, stage in enumerate(result.stages):
            change = Change.load(stage_folder(result.folder, index) / CHANGE)
            touched = {name for name in change.record.tensors if not name.startswith("heads.")}
            assert stage.tensors == len(touched) > 0
            assert cores[stage.task].indices.keys() == touched
            assert f"changed by {kind}: {len(touched)} of {len(cores[stage.task].infos)} tensors" in stage.report


def test_what_a_killed_process_left_is_removed(tmp_path: Path, untrained: None) -> None:
    folder = tmp_path / "stream"
    (folder / "running").mkdir(parents=True)
    (folder / ".stream.json.0123abcd").write_text("{")  # killed before there was anything else
    run(classifier(), "sequential", folder)
    shutil.rmtree(folder / "stages" / "002")
    (folder / "stages" / ".002.0123abcd" / MEMORY).mkdir(parents=True)
    run(classifier(), "sequential", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["baseline.json", "stages", "stream.json"]
    assert sorted(path.name for path in (folder / "stages").iterdir()) == ["000", "001", "002"]


def test_an_example_without_labelled_tokens_is_not_right() -> None:
    from gatedadapters.testing import tiny

    model, _ = tiny("llama", head="lm")
    ids = [3, 4, 5]
    with torch.no_grad():
        given = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    held_out = [
        {"input_ids": [*ids, given], "labels": [-100] * 3 + [label]} for label in (given, (given + 1) % 90, -100, -100)
    ]
    task = ga.Task("t", held_out, held_out, collate, exact_match)
    assert task.score(model) == 0.25


def test_earlier_directions_follow_the_model_to_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer moves the model after the penalty is built; "meta" stands in for a GPU."""
    found = []

    class Moved(Exception):  # noqa: N818
        pass

    def fit(self: Stage, *, penalty: Any = None, **kwargs: Any) -> float:
        if penalty is not None:
            self.model.to("meta")
            found.append(penalty().device.type)
            raise Moved
        return 0.0

    monkeypatch.setattr(Stage, "fit", fit)
    monkeypatch.setattr(StreamRunner, "_put_back", lambda *args: None)
    with pytest.raises(Moved):
        ga.run_stream(classifier(), tasks(), resolve("o_lora"), training=TRAINING)
    assert found == ["meta"]


def test_a_core_that_is_missing_is_told(tmp_path: Path, untrained: None) -> None:
    result = run(classifier(), "random", tmp_path / "stream")
    (stage_folder(tmp_path / "stream", 0) / MEMORY / "core.json").unlink()
    with pytest.raises(ga.errors.ArtifactError, match=r"not a stored core"):
        result.cores()
