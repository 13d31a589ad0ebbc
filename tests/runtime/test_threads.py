"""Threads that share one model: every call computes what it computes alone, whatever the others do meanwhile."""

from __future__ import annotations

import asyncio
import copy
import io
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatedadapters as ga
from gatedadapters.errors import TrainingError
from gatedadapters.testing.backbones import tiny
from gatedadapters.testing.helpers import checkpoint_activations, stir

THREADS = 4
CALLS = int(os.environ.get("THREAD_CALLS", "2000"))  # of each kind; 10,000 are run before a release
SMALLER: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 1},
    "mixtral": {"num_hidden_layers": 1},
}
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _switch_threads_often() -> Iterator[None]:
    """A switch every 10 microseconds (5 milliseconds by default), so that calls interleave inside a forward."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def stirred(family: str, space: str, *, tasks: Sequence[str] = ("default",), **options: Any) -> tuple[nn.Module, Batch]:
    model, batch = tiny(family, **SMALLER.get(family, {}), **options)
    stir(ga.attach(model, space, batch, tasks=tasks), by=0.3)
    return model, batch


def batches(batch: Batch, count: int = 8) -> list[Batch]:
    """Different texts of one shape: an output that belongs to another call differs."""
    return [{**batch, "input_ids": (batch["input_ids"] + 7 * i) % 90 + 1} for i in range(count)]


def wrong_calls(call: Callable[[Any], Tensor], cases: Sequence[Any], *, calls: int = CALLS) -> list[str]:
    """What `THREADS` threads got wrong in `calls` calls, against what one thread gets for the same cases."""
    with torch.no_grad():
        expected = [call(case) for case in cases]
    assert not all(torch.allclose(expected[0], other) for other in expected[1:])
    wrong: list[str] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        with torch.no_grad():
            for _ in range(calls // THREADS):
                index = chance.randrange(len(cases))
                try:
                    if not torch.equal(call(cases[index]), expected[index]):
                        wrong.append(f"case {index}: another output")
                except Exception as error:  # whatever happens to a call counts
                    wrong.append(repr(error))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    return wrong


def test_adapters_of_mixed_kinds() -> None:
    model, batch = stirred("bert", "encoder-mixed")
    ga.get_adapters(model).compact()
    assert wrong_calls(lambda given: model(**given)[0], batches(batch)) == []


def test_paths_at_weights_of_experts() -> None:
    model, batch = stirred("mixtral", "lora-all-linear")
    ga.get_adapters(model).compact()
    assert wrong_calls(lambda given: model(**given)[0], batches(batch, 4), calls=CALLS // 4) == []


@pytest.mark.parametrize("compact", [True, False])
def test_several_tasks_by_task_ids(compact: bool) -> None:
    model, batch = stirred("bert", "encoder-mixed", tasks=("a", "b", "c"))
    if compact:
        ga.get_adapters(model).compact()
    ids = [torch.tensor(pair) for pair in ([0, 0], [1, 2], [2, 0], [1, 1])]
    cases = [{**given, "task_ids": ids[i % len(ids)]} for i, given in enumerate(batches(batch))]
    assert wrong_calls(lambda given: model(**given)[0], cases) == []


def test_a_batch_of_several_tasks_inside_experts() -> None:
    model, batch = stirred("mixtral", "lora-all-linear", tasks=("a", "b"))
    ids = [torch.tensor(pair) for pair in ([0, 1], [1, 0], [1, 1])]
    cases = [{**given, "task_ids": ids[i % len(ids)]} for i, given in enumerate(batches(batch, 6))]
    assert wrong_calls(lambda given: model(**given)[0], cases, calls=CALLS // 8) == []


# -- a shelf -------------------------------------------------------------------------------------------------------


def shelf_on(folder: Path, head: str = "base") -> tuple[nn.Module, ga.Shelf, Batch]:
    folders = {}
    for seed, name in enumerate(("one", "two", "three")):
        model, batch = tiny("bert", **SMALLER["bert"], head=head)
        everything = ga.SearchSpace.load("encoder-mixed")
        paths = tuple(options for options in everything.paths if options.kind != "weight_lora")
        adapters = ga.attach(model, everything.model_copy(update={"paths": paths}), batch, seed=seed)
        stir(adapters, by=0.3, seed=seed)
        adapters.compact()
        adapters.save(folder / name)
        folders[name] = folder / name
    model, batch = tiny("bert", **SMALLER["bert"], head=head)
    return model, ga.Shelf.load(model, folders), batch


def test_a_shelf_by_adapter_names(tmp_path: Path) -> None:
    model, _, batch = shelf_on(tmp_path)
    names = (["one", "two"], ["three", None], ["two", "two"], [None, "one"])
    cases = [{**given, "adapter_names": names[i % len(names)]} for i, given in enumerate(batches(batch))]
    assert wrong_calls(lambda given: model(**given)[0], cases) == []


@pytest.mark.parametrize("head", ["base", "classification"])
def test_a_shelf_by_using_task_heads_included(head: str, tmp_path: Path) -> None:
    model, shelf, batch = shelf_on(tmp_path, head)

    def call(case: tuple[str | None, Batch]) -> Tensor:
        with shelf.using(case[0]):
            return model(**case[1])[0]

    cases = [(("one", "two", None, "three")[i % 4], given) for i, given in enumerate(batches(batch))]
    assert wrong_calls(call, cases) == []


@pytest.mark.parametrize("head", ["base", "classification"])
def test_activating_from_another_thread_each_call_sees_one_adapter_throughout(head: str, tmp_path: Path) -> None:
    model, shelf, batch = shelf_on(tmp_path, head)
    names = ("one", "two", "three", None)
    with torch.no_grad():
        alone = []
        for name in names:
            shelf.activate(name)
            alone.append(model(**batch)[0])
        done, wrong, seen = threading.Event(), [], set()

        def switch() -> None:
            chance = random.Random(0)
            while not done.is_set():
                shelf.activate(chance.choice(names))

        def work(_: int) -> None:
            with torch.no_grad():
                for _ in range(CALLS // 3):
                    output = model(**batch)[0]
                    which = [i for i, other in enumerate(alone) if torch.equal(output, other)]
                    (seen if which else wrong).add(which[0]) if which else wrong.append(output)

        switcher = threading.Thread(target=switch)
        switcher.start()
        try:
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(work, range(3)))
        finally:
            done.set()
            switcher.join()
    assert not wrong
    assert len(seen) == len(names)


def test_an_asyncio_server_that_hands_calls_to_a_pool_of_threads(tmp_path: Path) -> None:
    model, shelf, batch = shelf_on(tmp_path)
    cases = [(("one", "two", None, "three")[i % 4], given) for i, given in enumerate(batches(batch))]
    with torch.no_grad():
        expected = []
        for name, given in cases:
            with shelf.using(name):
                expected.append(model(**given)[0])

    def forward(given: Batch) -> Tensor:
        with torch.no_grad():
            return model(**given)[0]

    async def request(index: int) -> bool:
        name, given = cases[index]
        with shelf.using(name):  # requests interleave on the server's one thread; to_thread takes the context along
            await asyncio.sleep(0)
            return torch.equal(await asyncio.to_thread(forward, given), expected[index])

    async def serve() -> int:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
        right = 0
        for start in range(0, CALLS, 100):
            right += sum(await asyncio.gather(*(request(i % len(cases)) for i in range(start, start + 100))))
        return right

    assert asyncio.run(serve()) == CALLS


def test_disabled_in_one_thread_leaves_the_others_adapters_on() -> None:
    model, batch = stirred("bert", "encoder-mixed")
    adapters = ga.get_adapters(model)

    def call(case: tuple[bool, Batch]) -> Tensor:
        with adapters.disabled() if case[0] else nullcontext():
            return model(**case[1])[0]

    cases = [(i % 2 == 0, given) for i, given in enumerate(batches(batch))]
    assert wrong_calls(call, cases, calls=CALLS // 4) == []


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_two_threads_generate(family: str) -> None:
    model, batch = stirred(family, "decoder-mixed", head="lm", tasks=("a", "b"))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    adapters = ga.get_adapters(model)
    adapters.compact(task="b")
    cases = [{"input_ids": given["input_ids"]} for given in batches(batch)]
    assert wrong_calls(lambda given: model.generate(**given, **options), cases, calls=CALLS // 10) == []


# -- with what else a model may be -----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_a_copy_and_its_original_side_by_side(way: str) -> None:
    model, batch = stirred("bert", "encoder-mixed", tasks=("a", "b"))
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    ga.get_adapters(twin).set_task("a")
    ga.get_adapters(model).set_task("b")
    cases = [((model, twin)[i % 2], given) for i, given in enumerate(batches(batch))]
    assert wrong_calls(lambda case: case[0](**case[1])[0], cases, calls=CALLS // 4) == []


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler does that itself
def test_a_compiled_model(tmp_path: Path) -> None:
    model, batch = stirred("bert", "encoder-mixed", tasks=("a", "b", "c"))
    ga.get_adapters(model).compact()
    compiled = torch.compile(model, backend="eager")
    ids = [torch.tensor(pair) for pair in ([0, 0], [1, 2], [2, 0], [1, 1])]
    cases = [{**given, "task_ids": ids[i % len(ids)]} for i, given in enumerate(batches(batch))]
    assert wrong_calls(lambda given: compiled(**given)[0], cases, calls=CALLS // 4) == []
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # of the other threads
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_training_with_checkpointed_blocks_while_other_threads_call_without_gradients(use_reentrant: bool) -> None:
    """The blocks run again in backward with the task ids of the training's call, not with those of the others."""
    model, batch = stirred("bert", "encoder-mixed", tasks=("a", "b"))
    adapters = ga.get_adapters(model)
    for module in model.modules():  # blocks checkpoint in training mode alone, in which all else drops at random
        module.training = hasattr(module, "gradient_checkpointing")
    gradients = []
    done = threading.Event()

    def call() -> None:
        with torch.no_grad():
            while not done.is_set():
                model(**batch, task_ids=torch.tensor([1, 1]))

    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(model, use_reentrant=use_reentrant)
        others = [threading.Thread(target=call) for _ in range(2 * checkpointed)]
        for other in others:
            other.start()
        for _ in range(10 if checkpointed else 1):
            model.zero_grad()
            model(**batch, task_ids=torch.tensor([0, 1]))[0].square().sum().backward()
            gradients.append([p.grad.clone() for p in adapters.parameters() if p.grad is not None])
    done.set()
    for other in others:
        other.join()
    for other in gradients[1:]:
        for mine, first in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(mine, first, rtol=1e-4, atol=1e-6)


def test_two_trainings_of_one_model_at_once_are_refused_by_name() -> None:
    model, batch = stirred("bert", "encoder-mixed")
    adapters = ga.get_adapters(model)
    model.train()
    optimizer = torch.optim.SGD(adapters.parameters(), lr=0.1)
    caught: list[BaseException] = []

    def train(of: nn.Module) -> None:
        try:
            of(**batch)[0].sum().backward()
        except TrainingError as error:
            caught.append(error)

    def in_a_thread(of: nn.Module) -> None:
        thread = threading.Thread(target=train, args=(of,), name="second training")
        thread.start()
        thread.join()

    loss = model(**batch)[0].sum()
    in_a_thread(model)
    assert len(caught) == 1
    assert "'second training'" in str(caught[0])
    assert "'MainThread' is in the middle of a step" in str(caught[0])
    in_a_thread(copy.deepcopy(model))  # the remedy
    loss.backward()
    optimizer.step()
    in_a_thread(model)  # one after the other
    assert len(caught) == 1


def test_a_call_that_fails_leaves_nothing_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = stirred("bert", "encoder-mixed", tasks=("a", "b"))
    with torch.no_grad():
        ga.get_adapters(model).set_task("a")
        wanted = model(**batch)[0]
        encoded = model.encoder(model.embeddings(batch["input_ids"]))[0]
        with monkeypatch.context() as broken:
            broken.setattr(model.encoder.layer[0].output.dense, "forward", lambda *_: (_ for _ in ()).throw(OSError()))
            with pytest.raises(OSError):  # noqa: PT011
                model(**batch, task_ids=torch.tensor([1, 1]))
        assert torch.equal(model.encoder(model.embeddings(batch["input_ids"]))[0], encoded)
        assert torch.equal(model(**batch)[0], wanted)
