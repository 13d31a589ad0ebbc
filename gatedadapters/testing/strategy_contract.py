"""The contract of a strategy of continual tuning, as tests that a subclass inherits.

In a test file of your own, with pytest::

    class TestMyStrategy(StrategyContract):
        def strategy(self):
            return MyStrategy(steps=2)

        def may_move(self, stage, name):
            return name.startswith("backbone.")  # only where a stage has no core
"""

from __future__ import annotations

import copy
import gc
import json
import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from gatedadapters.backbone.fingerprint import is_own
from gatedadapters.continual import Stage, Strategy, StreamResult, check_stream, run_stream
from gatedadapters.continual.result import CHANGE, MEMORY, STAGE, stage_folder
from gatedadapters.continual.states import digest, state_of
from gatedadapters.continual.strategies import resolve
from gatedadapters.testing.streams import CLASSES, TRAINING, CountingCollate, tiny_classifier, tiny_tasks

State = dict[str, NDArray[Any]]
STOP_AFTER = 0.6
"""Share of the batches of a stream after which the contract stops it."""

SLACK = 512
"""Bytes of small tensors that the Trainer leaves, such as sums of losses."""


@dataclass
class FinishedStream:
    """A stream that was never stopped, and what was seen of it.

    Attributes:
        strategy: what it was run with, as it is afterwards.
        model: in its last state.
        result: of the stream.
        states: bits of the model before the first stage and after every stage.
        held: bytes of tensors outside the model, before the first stage and after every stage.
        batches: how many batches were made of the tasks' examples.
    """

    strategy: Strategy
    model: nn.Module
    result: StreamResult
    states: list[State]
    held: list[int]
    batches: int
    scratch: tempfile.TemporaryDirectory[str] = field(repr=False)


_FINISHED: dict[str, FinishedStream] = {}


def finished_stream(strategy: Strategy) -> FinishedStream:
    """`tiny_tasks` tuned by a strategy; each strategy is run once in a process."""
    key = json.dumps(strategy.identity())
    if key not in _FINISHED:
        model, collate = tiny_classifier(), CountingCollate()
        states, held = [_arrays(model)], [_bytes_outside(model)]

        def look(_: StreamResult) -> None:
            states.append(_arrays(model))
            held.append(_bytes_outside(model))

        scratch = tempfile.TemporaryDirectory(prefix="gatedadapters-")
        folder = Path(scratch.name) / "stream"
        used = copy.deepcopy(strategy)
        result = run_stream(model, tiny_tasks(collate), used, training=TRAINING, folder=folder, on_stage=look)
        _FINISHED[key] = FinishedStream(used, model, result, states, held, collate.count, scratch)
    return _FINISHED[key]


class StrategyContract:
    """Everything a strategy owes its users, on a tiny stream of three tasks.

    A subclass defines `strategy`, and `may_move` where a stage changes more than its core and its task's head.
    """

    @abstractmethod
    def strategy(self) -> Strategy:
        """The strategy to test, with options that make it quick: the tasks have 12 examples each."""

    def may_move(self, stage: int, name: str) -> bool:
        """Whether a stage may change a parameter beside the head of its task and the core that it selected.

        Args:
            stage: position of the stage in the stream.
            name: of the parameter: `backbone....`, or `heads.a.weight` of task a.
        """
        return False

    def test_every_task_is_scored_after_every_stage(self) -> None:
        """The rows of R are scores of the model as it is served; what is stored can be read again."""
        done = finished_stream(self.strategy())
        result, setup = done.result, check_stream(tiny_classifier(), tiny_tasks(), self.strategy(), training=TRAINING)
        assert result.tasks == tuple(CLASSES)
        assert len(result.matrix) == done.strategy.stages(setup)
        assert all(len(row) == len(CLASSES) and all(0 <= score <= 1 for score in row) for row in result.matrix)
        assert result.baseline.scores == [task.score(tiny_classifier()) for task in tiny_tasks()]
        assert result.stages[-1].state == digest(done.model)
        assert not done.model.training, "the model was in evaluation mode before the stream"
        assert str(result).splitlines()[0] == done.strategy.kind
        assert StreamResult.load(_folder(result)).to_data() == result.to_data()
        assert StreamResult.of(result.to_data()).metrics == result.metrics

    def test_serving_leaves_the_model_as_it_was(self) -> None:
        """And what is served scores as the last row of R says."""
        done = finished_stream(self.strategy())
        setup = check_stream(tiny_classifier(), tiny_tasks(), self.strategy(), training=TRAINING)
        parts = {**vars(setup), "model": done.model}
        stage = Stage(**parts, index=0, folder=_folder(done.result), watch=lambda _: None)
        for index, task in enumerate(tiny_tasks()):
            with done.strategy.serving(stage.at(index)):
                assert task.score(done.model) == done.result.matrix[-1][index]
        assert digest(done.model) == done.result.stages[-1].state, "serving changed the model"

    def test_only_the_core_and_the_active_head_move(self) -> None:
        """Bit by bit, under weight decay, after every stage; beside them only what `may_move` names."""
        done = finished_stream(self.strategy())
        cores = dict(done.result.cores())
        for index, record in enumerate(done.result.stages):
            before, after = done.states[index], done.states[index + 1]
            core = cores.get(record.task)
            own = f"heads.{record.task}."
            heads = [name for name in after if name.startswith(own)]
            assert all((before[name] != after[name]).any() for name in heads), f"{own} was not trained"
            for name in (name for name in before.keys() & after.keys() if not is_own(name)):
                moved = np.flatnonzero(before[name] != after[name])
                allowed = core.indices.get(name, torch.empty(0)).numpy() if core is not None else ()
                outside = np.setdiff1d(moved, allowed)
                if len(outside) and not name.startswith(own) and not self.may_move(index, name):
                    raise AssertionError(f"stage {index} ({record.task}) moved {len(outside)} elements of {name}")
            if core is not None:
                assert record.tensors == len(core.indices)

    def test_nothing_is_computed_or_moved_by_the_check(self) -> None:
        """A stream that is only checked leaves no trace."""
        model = tiny_classifier()
        before, flags = _arrays(model), [p.requires_grad for p in model.parameters()]
        check_stream(model, tiny_tasks(), self.strategy(), training=TRAINING)
        _assert_equal(before, _arrays(model))
        assert flags == [p.requires_grad for p in model.parameters()]

    def test_a_stopped_stream_ends_with_the_bits_of_one_that_was_not(self) -> None:
        """Stopping leaves the model as it was; going on, with other global random numbers, ends in the same bits."""
        done = finished_stream(self.strategy())
        with tempfile.TemporaryDirectory(prefix="gatedadapters-") as scratch:
            folder, training = Path(scratch) / "stream", TRAINING.model_copy(update={"checkpoint_steps": 2})
            model, tasks = tiny_classifier(), tiny_tasks(CountingCollate(stop_at=round(STOP_AFTER * done.batches)))
            flags = [p.requires_grad for p in model.parameters()]
            try:
                run_stream(model, tasks, self.strategy(), training=training, folder=folder)
            except KeyboardInterrupt:
                _assert_equal(done.states[0], _arrays(model))
                assert flags == [p.requires_grad for p in model.parameters()]
            else:
                raise AssertionError("the stream was to be stopped")
            model = tiny_classifier()
            torch.manual_seed(99)
            found = run_stream(model, tiny_tasks(), self.strategy(), training=training, folder=folder)
            _assert_equal(done.states[-1], _arrays(model))
            assert [stage.state for stage in found.stages] == [stage.state for stage in done.result.stages]
            assert found.matrix == done.result.matrix
            assert _files(folder) == _files(_folder(done.result))

    def test_every_earlier_state_is_restored_bit_for_bit(self) -> None:
        """From the last state backwards and forwards, and from the untrained model."""
        done = finished_stream(self.strategy())
        model, last = tiny_classifier(), len(done.result.stages)
        for to in (last, 1, last, 0, last):
            done.result.restore(model, to)
            restored = _arrays(model)
            _assert_equal(done.states[to], {name: restored[name] for name in done.states[to]})

    def test_the_strategy_holds_no_state_of_a_stream(self) -> None:
        """It is afterwards what it was, and can be built again from its options."""
        used, fresh = finished_stream(self.strategy()).strategy, self.strategy()
        assert used == fresh, "a stream changed the strategy: write what later stages need into stage.memory"
        assert type(fresh).parse(fresh.model_dump(mode="json"), where="StrategyContract") == fresh
        assert resolve(fresh) is fresh

    def test_what_is_stored_is_named_and_safe_to_read(self) -> None:
        """Stages hold what they are documented to hold; the strategy's files are JSON or named tensors."""
        folder = _folder(finished_stream(self.strategy()).result)
        assert {path.name for path in folder.iterdir()} <= {"stream.json", "baseline.json", "stages", "probes"}
        for index in range(len(finished_stream(self.strategy()).result.stages)):
            stage = stage_folder(folder, index)
            assert {path.name for path in stage.iterdir()} == {STAGE, CHANGE, MEMORY}
            for file in (path for path in (stage / MEMORY).rglob("*") if path.is_file()):
                if file.suffix == ".safetensors":
                    with safe_open(file, framework="pt") as stored:
                        assert all(stored.keys()), file
                elif file.name != "README.md":  # the card of saved adapters
                    assert file.suffix == ".json", f"{file.name}: store JSON or safetensors"
                    json.loads(file.read_text(encoding="utf-8"))

    def test_the_memory_of_a_stage_is_released(self) -> None:
        """After a stage no tensor is held outside the model: no optimiser state, no copy of weights."""
        held = finished_stream(self.strategy()).held
        assert max(held) <= held[0] + SLACK, f"bytes of tensors outside the model before and after every stage: {held}"


def _folder(result: StreamResult) -> Path:
    assert result.folder is not None
    return result.folder


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _arrays(model: nn.Module) -> State:
    """Flat copies of parameters and buffers. NumPy's, so that they do not count as tensors that a stage holds."""
    return {name: value.detach().cpu().flatten().numpy().copy() for name, value in state_of(model)}


def _bytes_outside(model: nn.Module) -> int:
    """Bytes of all tensors that are alive and no part of the model."""
    own = {value.untyped_storage().data_ptr() for _, value in state_of(model)}
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        plain = type(found) is Tensor or type(found) is nn.Parameter  # a compiler's fake tensors have no storage
        if plain and found.device.type == "cpu":
            storages[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
    return sum(size for pointer, size in storages.items() if pointer not in own)


def _assert_equal(a: Mapping[str, NDArray[Any]], b: Mapping[str, NDArray[Any]]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert np.array_equal(value, b[name]), f"{name} differs"
