"""Streams: what moves and what does not, restoring, stopping and going on."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from streams import (
    CLASSES,
    PROBE,
    RESUMED,
    TRAINING,
    classifier,
    interrupted,
    moved,
    options,
    run,
    state,
    tasks,
)
from torch.optim.optimizer import register_optimizer_step_post_hook

import gatedadapters as ga
from gatedadapters.continual import Strategy, TunedStage, fitting, strategy_kinds
from gatedadapters.continual.result import MEMORY, StreamResult, stage_folder
from gatedadapters.continual.runner import StreamRunner
from gatedadapters.continual.stage import Stage
from gatedadapters.continual.states import Change, digest
from gatedadapters.continual.strategies import resolve
from gatedadapters.continual.strategies.lota import LoTA
from gatedadapters.errors import ArtifactError, DataError
from gatedadapters.testing.strategy_contract import finished_stream

# -- what a stream is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["l2_fisher", "random"])
def test_of_cores_of_elements_nothing_else_and_the_active_head_move(kind: str) -> None:
    """Under weight decay, bit by bit, after every task; for cores of tensors see the contract."""
    model = classifier()
    before = state(model)
    seen = []

    def watched(task: ga.Task) -> ga.Task:
        def measure(model: Any, own: ga.Task) -> float:
            if own.name == "a":  # scored first, once after every task
                seen.append(state(model))
            return ga.Task.__dataclass_fields__["measure"].default(model, own)

        return ga.Task(**{**{f: getattr(task, f) for f in task.__dataclass_fields__}, "measure": measure})

    strategy = options(kind, core={"granularity": "element", "share": 0.1})
    result = ga.run_stream(model, [watched(task) for task in tasks()[:2]], strategy, training=TRAINING)
    states = [before, *seen[1:]]
    assert len(states) == 3
    for index, name in enumerate("ab"):
        changed = moved(states[index], states[index + 1])
        assert {f"heads.{name}.weight", f"heads.{name}.bias"} <= changed
        assert not any(part.startswith("heads.") and not part.startswith(f"heads.{name}.") for part in changed)
        backbone = [part for part in changed if not part.startswith("heads.")]
        count = sum(int((states[index][part] != states[index + 1][part]).sum()) for part in backbone)
        assert 0 < count <= result.stages[index].elements


@pytest.mark.parametrize("kind", ["l2_fisher", "lota", "random", "cosine"])
def test_what_moved_lies_within_the_stored_core(kind: str, finished: Any) -> None:
    _, result = finished(kind)
    cores = result.cores()
    assert [name for name, _ in cores] == list(CLASSES)
    if kind == "l2_fisher":
        assert all(len(core.indices) == 5 for _, core in cores)  # a tenth of 53 tensors
    for index, (_, core) in enumerate(cores):
        assert core.elements == result.stages[index].elements
        change = Change.load(stage_folder(result.folder, index) / "change")
        for name in change.record.tensors:
            if not name.startswith("heads."):
                assert set(change.positions(name).tolist()) <= set(core.indices[name].tolist())


def test_exclusive_cores_do_not_meet(untrained: None) -> None:
    seen = []

    class Watched(LoTA):
        def tune(self, stage: Stage) -> Any:
            found = super().tune(stage)
            seen.append(found.core)
            return found

    core = {"share": 0.2, "granularity": "element", "overlap": "exclude_previous"}
    strategy = Watched.parse({"probe": PROBE, "core": core}, where="test")
    ga.run_stream(classifier(), tasks()[:2], strategy, training=TRAINING)
    assert seen[0].elements == seen[1].elements
    assert seen[0].overlap(seen[1]) == 0


@pytest.mark.parametrize("kind", ["l2_fisher", "random"])
@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_what_may_not_be_chosen_is_not(kind: str, granularity: str, tmp_path: Path, untrained: None) -> None:
    core = {"granularity": granularity, "share": 0.1, "include": ["backbone.encoder.*"], "exclude": ["bias", "norm"]}
    given = options(kind, core=core)
    result = ga.run_stream(classifier(), tasks()[:1], given, training=TRAINING, folder=tmp_path / "stream")
    ((_, found),) = result.cores()
    matrices = {n: p.numel() for n, p in classifier().named_parameters() if "encoder" in n and p.dim() == 2}
    assert found.indices.keys() <= set(matrices)
    assert found.infos.keys() == {n for n, _ in classifier().named_parameters() if n.startswith("backbone.")}
    if granularity == "element":
        assert found.elements == round(0.1 * sum(matrices.values()))


def test_elements_for_random_cores_are_exact(finished: Any, untrained: None) -> None:
    counts = [stage.elements for stage in finished("l2_fisher")[1].stages]
    control = run(classifier(), "random", elements=counts)
    assert [stage.elements for stage in control.stages] == counts


def test_per_task_structures_forget_nothing_and_leave_the_backbone_alone(finished: Any) -> None:
    model, result = finished("per_task")
    before = state(classifier())
    assert all(name.startswith("heads.") for name in moved(before, state(model)))
    columns = list(zip(*result.matrix, strict=True))
    assert all(len(set(column[index:])) == 1 for index, column in enumerate(columns))
    assert result.metrics.forgetting == 0


def test_merged_structures_leave_no_adapter_behind(finished: Any) -> None:
    for kind in ("gated", "o_lora"):
        model, _ = finished(kind)
        assert not hasattr(model, "gated_adapters")
        assert state(model).keys() == state(classifier()).keys()


def test_o_lora_keeps_directions_apart(finished: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    def overlap(folder: Path | None) -> float:
        assert folder is not None
        taken = load_file(stage_folder(folder, 2) / MEMORY / "directions.safetensors")
        total = 0.0
        for value in taken.values():
            new, old = value[-8:], value[:-8]
            total += float((new @ old.T).abs().sum())
        return total

    free = run(classifier(), "o_lora", tmp_path / "stream", orthogonality=0.0)
    assert overlap(finished("o_lora")[1].folder) < 0.9 * overlap(free.folder)


def test_lota_is_by_element_whatever_else_is_said_of_its_core() -> None:
    for core in ({"share": 0.05}, {"overlap": "exclude_previous"}, {}):
        found = resolve({"kind": "lota", "core": core})
        assert isinstance(found, LoTA)
        assert found.core.granularity == "element"
    assert LoTA().core.granularity == "element"


def test_ewc_pulls_as_the_summed_fisher_information_says(monkeypatch: pytest.MonkeyPatch) -> None:
    name, at, step, weight = "backbone.encoder.layer.1.output.dense.weight", (3, 5), 0.01, 7.0
    found: list[float] = []
    original = Stage.fit

    def fit(stage: Stage, **options: Any) -> Any:
        penalty, element = options["penalty"], stage.model.get_parameter(name)
        if penalty is not None:
            assert float(penalty().detach()) == 0
            with torch.no_grad():
                element[at] += step
                found.append(float(penalty().detach()))
                element[at] -= step
        else:
            assert stage.index == 0
        fitted = original(stage, **{**options, "penalty": None})
        batches = list(stage.batches(4))[:2]
        fisher.append(float(ga.score(stage.model, batches, kind="fisher", heads=sorted(stage.all_heads))[name][at]))
        return fitted

    fisher: list[float] = []
    monkeypatch.setattr(Stage, "fit", fit)
    run(classifier(dropout=0.0), "ewc", weight=weight)
    expected = [0.5 * weight * sum(fisher[:count]) * step**2 for count in (1, 2)]
    assert found == pytest.approx(expected, rel=1e-3)


def test_streams_of_equal_seeds_are_equal_and_others_are_not() -> None:
    digests = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed + 5)
        model = classifier()
        ga.run_stream(model, tasks()[:1], "sequential", training=TRAINING.model_copy(update={"seed": seed}))
        digests.append(digest(model))
    assert digests[0] == digests[1] != digests[2]


def test_generation_and_multiple_choice_share_the_models_head(tmp_path: Path) -> None:
    from transformers import AutoTokenizer
    from words import save_tokenizer

    from gatedadapters.continual import answer_task, choice_tasks
    from gatedadapters.data import ChoiceExample, ChoiceTask
    from gatedadapters.data.language import Passage
    from gatedadapters.testing import tiny

    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    questions = tuple(ChoiceExample("the film was", ("good", "bad", "long"), 1) for _ in range(9))
    passages = [Passage("the dog", "runs"), Passage("the cat", "sleeps today")] * 4
    stream = [
        answer_task("answer", passages, passages[:2], tokenizer, max_length=16),
        *choice_tasks([ChoiceTask("choice", questions, (), questions[:4])], tokenizer, max_length=16),
    ]
    model, _ = tiny("llama", head="lm")
    training = TRAINING.model_copy(update={"steps": 20, "weight_decay": 0.0})
    result = ga.run_stream(model, stream, "sequential", training=training)
    assert result.baseline.scores[0] == 0
    assert result.matrix[0][0] == 1  # both answers are learned word for word
    assert result.matrix[1][1] == 1
    with pytest.raises(DataError, match="no answer"):
        answer_task("answer", [Passage("the dog")], passages, tokenizer)


def test_heads_of_no_task_in_the_stream_are_neither_counted_nor_moved() -> None:
    model = classifier()
    before = state(model)
    result = ga.run_stream(model, tasks()[:1], "sequential", training=TRAINING)
    assert result.stages[0].elements == sum(v.numel() for n, v in before.items() if n.startswith("backbone."))
    assert {name.split(".")[1] for name in moved(before, state(model)) if name.startswith("heads.")} == {"a"}


# -- states ------------------------------------------------------------------------------------------------------------


def test_a_state_is_restored_from_the_base_and_never_from_a_model_of_another_state(finished: Any) -> None:
    """Which state the model is in is read off its bits: it used to be taken for the last one."""
    _, result = finished("l2_fisher")
    model = classifier()
    result.restore(model, 3)
    assert digest(model) == result.stages[-1].state
    result.restore(model, 3)
    assert digest(model) == result.stages[-1].state
    result.restore(model, 2)
    assert digest(model) == result.stages[1].state
    with pytest.raises(ArtifactError, match="no such state"):
        result.restore(model, 4)
    with torch.no_grad():
        model.heads["a"].bias.add_(1)
    was = state(model)
    for to in range(4):
        with pytest.raises(ArtifactError, match="no state of this stream"):
            result.restore(model, to)
    assert not moved(was, state(model))


def test_adapters_cannot_be_restored_into_another_model(finished: Any, tmp_path: Path) -> None:
    """Nor where a stored change is damaged: what was attached for it is taken out again."""
    _, result = finished("lora")
    assert result.folder is not None
    damaged = StreamResult.load(shutil.copytree(result.folder, tmp_path / "damaged"))
    (stage_folder(tmp_path / "damaged", 0) / "change" / "change.safetensors").write_bytes(b"x" * 40)
    for other, stream, says in (
        (classifier(seed=1), result, "no state of this stream"),
        (classifier(), damaged, "cannot be read|damaged|altered"),
    ):
        before = state(other)
        with pytest.raises(ArtifactError, match=says):
            stream.restore(other, 1)
        assert not moved(before, state(other))
        assert all(p.requires_grad for p in other.parameters())


def test_adapters_of_all_tasks_are_served_from_one_shelf(finished: Any) -> None:
    model, result = finished("per_task")
    served = copy.deepcopy(model).eval()
    shelf = result.shelf(served)
    assert list(result.adapters) == list(CLASSES)
    for index, task in enumerate(tasks()):
        with shelf.using(task.name):
            assert task.score(served) == result.matrix[-1][index]
    with pytest.raises(ArtifactError, match="has adapters of its own"):
        finished("l2_fisher")[1].shelf(served)


def test_a_stream_that_keeps_the_last_state_alone_still_goes_on(finished: Any, tmp_path: Path) -> None:
    whole, _ = finished("sequential")
    stopped = classifier()
    with interrupted(at=10), pytest.raises(KeyboardInterrupt):
        ga.run_stream(stopped, tasks(), "sequential", training=TRAINING, folder=tmp_path / "s", keep=False)
    result = ga.run_stream(stopped, tasks(), "sequential", training=TRAINING, folder=tmp_path / "s", keep=False)
    assert digest(stopped) == digest(whole)
    assert [p.parent.name for p in sorted((tmp_path / "s").glob("stages/*/change"))] == ["002"]
    with pytest.raises(ArtifactError, match="no such state"):
        result.restore(stopped, 1)


@pytest.mark.parametrize("kind", ["per_task", "sequential"])
def test_a_task_stopped_after_its_training_is_not_trained_further(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Trainer itself takes one more step where an epoch is not over: gates, whose rate does not decay, moved."""
    given = options(kind, **({"schedule": {"prune": None}} if kind == "per_task" else {}))
    stopped, wanted = classifier(), finished_stream(resolve(given)).result
    finish = StreamRunner._finish_stage

    def kill(self: StreamRunner, stage: Stage, *args: Any) -> None:
        if stage.index == 1:
            raise KeyboardInterrupt
        finish(self, stage, *args)

    monkeypatch.setattr(StreamRunner, "_finish_stage", kill)
    with pytest.raises(KeyboardInterrupt):
        ga.run_stream(stopped, tasks(), given, training=RESUMED, folder=tmp_path / "stopped")
    monkeypatch.setattr(StreamRunner, "_finish_stage", finish)
    steps: list[int] = []
    counting = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    found = ga.run_stream(classifier(), tasks(), given, training=RESUMED, folder=tmp_path / "stopped")
    counting.remove()
    assert len(steps) == RESUMED.steps  # of the third task
    assert [stage.state for stage in found.stages] == [stage.state for stage in wanted.stages]
    assert [stage.report for stage in found.stages] == [stage.report for stage in wanted.stages]
    assert [stage.bytes for stage in found.stages] == [
        stage.bytes for stage in wanted.stages
    ]  # what is said of it, too


def test_a_stream_killed_at_a_random_moment_ends_with_the_same_bits(
    finished: Any, killed_at_checkpoint: Callable[..., None], tmp_path: Path
) -> None:
    _, wanted = finished("l2_fisher")
    folder, moment = tmp_path / "stream", random.SystemRandom().randint(1, 14)  # of 18 checkpoints
    script = Path(__file__).with_name("streams.py")
    killed_at_checkpoint(processes.start(processes.script, script, str(folder), "l2_fisher"), folder, moment)
    model = classifier()
    found = ga.run_stream(model, tasks(), options("l2_fisher"), training=RESUMED, folder=folder)
    said = f"killed at checkpoint {moment}"
    assert [stage.state for stage in found.stages] == [stage.state for stage in wanted.stages], said
    assert found.matrix == wanted.matrix, said


def test_a_stopped_stream_remembers_what_earlier_tasks_chose(tmp_path: Path) -> None:
    core = {"share": 0.3, "overlap": "exclude_previous"}
    given = {"kind": "random", "core": {**core, "granularity": "element"}}
    with interrupted(at=6), pytest.raises(KeyboardInterrupt):
        ga.run_stream(classifier(), tasks()[:2], given, training=TRAINING, folder=tmp_path / "stream")
    result = ga.run_stream(classifier(), tasks()[:2], given, training=TRAINING, folder=tmp_path / "stream")
    (_, first), (_, second) = result.cores()
    assert first.elements == second.elements
    assert first.overlap(second) == 0


def test_a_checkpoint_that_was_not_written_to_its_end_does_not_count(tmp_path: Path) -> None:
    for step, whole in ((9, True), (10, True), (11, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if whole:
            (folder / fitting.COMPLETE).touch()
    assert fitting._last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-11").exists()
    assert fitting._last_checkpoint(tmp_path / "none") is None


def test_a_finished_stream_is_read_and_its_last_state_put_into_the_model(finished: Any) -> None:
    done, result = finished("l2_fisher")
    model = classifier()
    again = ga.run_stream(model, tasks(), options("l2_fisher"), training=RESUMED, folder=result.folder)
    assert again.to_data() == result.to_data()
    assert not moved(state(done), state(model))


# -- seams -------------------------------------------------------------------------------------------------------------


def test_records_that_disagree_about_a_general_task_are_refused(finished: Any, tmp_path: Path) -> None:
    shutil.copytree(finished("random")[1].folder, tmp_path / "copy")
    file = tmp_path / "copy" / "baseline.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps({"scores": data["scores"], "general": 0.5}))
    with pytest.raises(ArtifactError, match="do not belong together"):
        StreamResult.load(tmp_path / "copy")


def test_cores_of_a_small_model_are_carried_to_a_larger_one(finished: Any, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    _, small = finished("l2_fisher")
    backbone = BertModel(
        BertConfig(
            vocab_size=99,
            hidden_size=40,
            num_hidden_layers=6,
            num_attention_heads=4,
            intermediate_size=56,
            max_position_embeddings=64,
        ),
        add_pooling_layer=False,
    )
    model = ga.MultiTaskClassifier(backbone, CLASSES)
    copy = tmp_path / "small"
    shutil.copytree(small.folder, copy)
    result = ga.run_stream(
        model, tasks(), {"kind": "carried", "source": str(copy)}, training=TRAINING, folder=tmp_path / "large"
    )
    for (_, mine), (_, theirs) in zip(result.cores(), small.cores(), strict=True):
        blocks = {theirs.infos[name].block for name in theirs.indices} - {None}
        assert {mine.infos[name].block for name in mine.indices} - {None} == {2 * b + i for b in blocks for i in (0, 1)}
        assert {mine.infos[n].pattern for n in mine.indices} == {theirs.infos[n].pattern for n in theirs.indices}


def test_a_new_strategy_is_one_class() -> None:
    class Nothing(Strategy):
        kind = "nothing"

        def tune(self, stage: Stage) -> TunedStage:
            return TunedStage(0, 0.0)

    model = classifier()
    result = ga.run_stream(model, tasks(), Nothing())
    assert result.matrix == [result.baseline.scores] * 3
    assert "nothing" not in strategy_kinds()
    assert resolve("sequential") == resolve({"kind": "sequential"})
