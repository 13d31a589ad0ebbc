"""The clock of optimiser steps: who hears what, in which order, and when torch's hooks are there at all."""

from __future__ import annotations

import copy
import gc
import io
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import processes
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
)

import gatedadapters as ga
from gatedadapters.gates import GateBank, GateGroup
from gatedadapters.runtime.steps import CLOCK, StepClock, StepListener, Turn
from gatedadapters.testing.backbones import tiny


class Heard(StepListener):
    """Writes down what it hears, under its name."""

    turn: ClassVar[Turn] = Turn.GATES

    def __init__(self, parameters: Iterable[Tensor], log: list[str], name: str = "it") -> None:
        self.parameters, self.log, self.name = list(parameters), log, name
        self.asked = 0

    def watched(self) -> Iterable[Tensor]:
        self.asked += 1
        return self.parameters

    def training_begins(self, optimizer: Optimizer) -> None:
        self.log.append(f"{self.name} begins")

    def after_step(self, optimizer: Optimizer | None) -> None:
        self.log.append(f"{self.name} after" + (" none" if optimizer is None else ""))


class HeardBefore(Heard):
    turn: ClassVar[Turn] = Turn.DELTA

    def before_step(self, optimizer: Optimizer) -> None:
        self.log.append(f"{self.name} before")


class Last(Heard):
    turn: ClassVar[Turn] = Turn.RAMP


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(2))


def sgd(*parameters: nn.Parameter) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.fixture
def clock() -> Iterator[StepClock]:
    """A clock of the test's own; torch's hooks are as before in the end."""
    gc.collect()
    before = dict(_global_optimizer_post_hooks), dict(_global_optimizer_pre_hooks)
    clock = StepClock()
    yield clock
    for entry in clock._entries:
        listener = entry.listener()
        if listener is not None:
            clock.discard(listener)
    assert (dict(_global_optimizer_post_hooks), dict(_global_optimizer_pre_hooks)) == before


# -- torch's hooks -----------------------------------------------------------------------------------------------------


def test_importing_the_package_registers_nothing(tmp_path: Path) -> None:
    script = """
import gatedadapters as ga
for name in ga.__all__:
    getattr(ga, name)
from torch.optim import optimizer
print(len(optimizer._global_optimizer_pre_hooks), len(optimizer._global_optimizer_post_hooks))
"""
    said = processes.run(processes.code, script, log=tmp_path / "log")
    assert (
        said.splitlines()[-1] == "0 0"
    )  # bitsandbytes, which transformers imports where it is installed, speaks first


def test_the_hooks_come_with_the_first_listener_and_go_with_the_last(clock: StepClock) -> None:
    hooks = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    weight, log = parameter(), []
    first, second = Heard([weight], log, "first"), Heard([weight], log, "second")
    for listener in (first, second, first):
        clock.add(listener)
        assert clock.running
        assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == (hooks[0] + 1, hooks[1] + 1)
    sgd(weight).step()
    assert log == ["first after", "second after"]
    clock.discard(first)
    assert clock.running
    clock.discard(second)
    assert not clock.running
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == hooks
    sgd(weight).step()
    assert len(log) == 2


def test_listeners_are_held_weakly(clock: StepClock) -> None:
    listener = Heard([parameter()], [])
    clock.add(listener)
    del listener
    gc.collect()
    assert not clock.running


def test_a_listener_that_ends_in_the_middle_of_a_step_does_not_disturb_it(clock: StepClock) -> None:
    """Torch iterates over its hooks meanwhile, and must not lose one."""
    weight, after = parameter(), []

    class Leaving(Heard):
        def after_step(self, optimizer: Optimizer | None) -> None:
            clock.discard(self)

    listener = Leaving([weight], [])
    clock.add(listener)
    behind = register_optimizer_step_post_hook(lambda *_: after.append(1))
    try:
        sgd(weight).step()
    finally:
        behind.remove()
    assert after == [1]
    clock.discard(listener)  # whatever comes or goes next takes the hooks along
    assert not clock.running


def test_threads_that_add_listeners_at_once_register_one_pair_of_hooks(clock: StepClock) -> None:
    hooks = len(_global_optimizer_post_hooks)
    listeners = [Heard([parameter()], []) for _ in range(32)]
    barrier = threading.Barrier(len(listeners))

    def add(listener: Heard) -> None:
        barrier.wait()
        clock.add(listener)

    threads = [threading.Thread(target=add, args=(listener,)) for listener in listeners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(_global_optimizer_post_hooks) == hooks + 1
    assert len(clock._entries) == len(listeners)


# -- who hears what ----------------------------------------------------------------------------------------------------


def test_listeners_hear_a_step_by_turn_and_then_in_the_order_they_came(clock: StepClock) -> None:
    weight, log = parameter(), []
    listeners = [
        Last([weight], log, "ramp"),
        Heard([weight], log, "gates"),
        HeardBefore([weight], log, "delta"),
        Heard([weight], log, "more gates"),
    ]
    for listener in listeners:
        clock.add(listener)
    clock.training_begins(sgd(weight))
    order = ["delta", "gates", "more gates", "ramp"]
    assert log == [f"{name} begins" for name in order]
    log.clear()
    sgd(weight).step()
    assert log == ["delta before", *(f"{name} after" for name in order)]
    assert list(Turn) == [Turn.DELTA, Turn.GATES, Turn.PRUNE, Turn.RAMP]


def test_only_optimisers_that_hold_a_watched_parameter_are_heard(clock: StepClock) -> None:
    mine, other, log = parameter(), parameter(), []
    listener = Heard([mine, parameter()], log)
    clock.add(listener)
    sgd(other).step()
    clock.training_begins(sgd(other))
    assert not log
    sgd(other, mine).step()
    assert log == ["it after"]


def test_whether_an_optimiser_is_heard_is_worked_out_once(clock: StepClock) -> None:
    mine, other = parameter(), parameter()
    listener = Heard([mine], [])
    clock.add(listener)
    optimizers = [sgd(mine), sgd(other)]
    for _ in range(5):
        for optimizer in optimizers:
            optimizer.step()
    assert listener.asked == len(optimizers)
    assert len(listener.log) == 5


CHANGES: dict[str, Callable[[Any, nn.Parameter], None]] = {
    "another group": lambda optimizer, mine: optimizer.add_param_group({"params": [mine]}),
    "another list": lambda optimizer, mine: optimizer.param_groups[0].update(params=[mine]),
    "an element replaced": lambda optimizer, mine: optimizer.param_groups[0]["params"].__setitem__(0, mine),
    "an element more": lambda optimizer, mine: optimizer.param_groups[0]["params"].append(mine),
}


@pytest.mark.parametrize("how", CHANGES)
def test_an_optimiser_that_takes_a_watched_parameter_later_is_heard_from_then_on(how: str, clock: StepClock) -> None:
    mine, log = parameter(), []
    listener = Heard([mine], log)
    clock.add(listener)
    optimizer = sgd(parameter())
    optimizer.step()
    assert not log
    CHANGES[how](optimizer, mine)
    optimizer.step()
    assert log == ["it after"]


def test_an_error_before_a_step_keeps_the_optimiser_from_it(clock: StepClock) -> None:
    class Refusing(HeardBefore):
        def before_step(self, optimizer: Optimizer) -> None:
            raise ValueError("no")

    weight, log = parameter(), []
    weight.grad = torch.ones(2)
    listener = Refusing([weight], log)
    clock.add(listener)
    with pytest.raises(ValueError, match="no"):
        sgd(weight).step()
    assert torch.equal(weight, torch.zeros(2))
    assert not log
    clock.discard(listener)
    assert not clock.running  # a step that failed is not taken for one that goes on


def test_steps_of_other_optimisers_are_told_by_hand(clock: StepClock) -> None:
    mine, log = parameter(), []
    listener = Heard([mine], log)
    clock.add(listener)
    clock.stepped([parameter()])
    assert not log
    clock.stepped([parameter(), mine])
    assert log == ["it after none"]


def test_an_optimiser_that_accelerate_wrapped_is_the_one_inside(clock: StepClock) -> None:
    mine, told = parameter(), []

    class Told(Heard):
        def training_begins(self, optimizer: Optimizer) -> None:
            told.append(optimizer)

    listener, optimizer = Told([mine], []), sgd(mine)
    clock.add(listener)
    wrapped = Accelerator(cpu=True).prepare_optimizer(optimizer)
    assert wrapped is not optimizer
    clock.training_begins(wrapped)
    assert told == [optimizer]


# -- the listeners of the package --------------------------------------------------------------------------------------


def bank_of() -> GateBank:
    return GateBank([GateGroup("a:lora", "a", "a", 2, 1.0, 1.0)], ga.GateConfig(), tasks=1, seed=0)


def copied(thing: Any, how: str) -> Any:
    if how == "deep copy":
        return copy.deepcopy(thing)
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", ["deep copy", "pickle"])
def test_copies_of_gates_hear_their_own_optimiser(how: str) -> None:
    bank = bank_of()
    twin = copied(bank, how)
    for one, other in ((bank, twin), (twin, bank)):
        bank.draw()
        twin.draw()
        torch.optim.SGD(one.parameters(), lr=0.1).step()
        assert one.step_is_new()
        assert not other.step_is_new()


@pytest.mark.parametrize("how", ["deep copy", "pickle"])
def test_copies_of_a_model_prune_by_their_own_optimiser(how: str) -> None:
    model, batch = tiny("llama", head="lm")
    schedule = ga.Schedule(warmup=0, ramp=0, prune=0.5)
    ga.attach(model, "attention-only", batch, penalty=ga.L0(weight=0.1), schedule=schedule, total_steps=2)
    twin = copied(model, how)
    for one, other in ((model, twin), (twin, model)):
        adapters, before = ga.get_adapters(one), ga.get_adapters(other).structure
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        (one.train()(**batch, labels=batch["input_ids"]).loss + adapters.penalty()).backward()
        optimizer.step()
        assert adapters.structure is not None
        assert ga.get_adapters(other).structure is before


@pytest.mark.parametrize("how", ["deep copy", "pickle"])
def test_copies_of_a_tuned_model_are_written_by_their_own_optimiser(how: str) -> None:
    model, _ = tiny("llama")
    chosen = {"layers.0.mlp.up_proj.weight": torch.arange(5)}
    ga.apply_mask(model, ga.Mask.build(model, chosen))
    twin = copied(model, how)
    for one, other in ((model, twin), (twin, model)):
        deltas = ga.get_delta(one), ga.get_delta(other)
        weights = [m.layers[0].mlp.up_proj._parameters["weight"] for m in (one, other)]
        before = [weight.detach().clone() for weight in weights]
        for values in deltas[0].parameters():
            values.grad = torch.ones_like(values)
        torch.optim.SGD(deltas[0].parameters(), lr=0.1).step()
        assert not torch.equal(weights[0], before[0])
        assert torch.equal(weights[1], before[1])


def test_what_leaves_a_model_leaves_no_listener() -> None:
    def listeners() -> int:
        gc.collect()
        return len(CLOCK._entries)

    others = listeners()  # of models that fixtures of other tests keep
    model, batch = tiny("llama", head="lm")
    adapters = ga.attach(model, "attention-only", batch)
    assert listeners() > others
    adapters.compact()
    adapters.detach()
    assert listeners() == others
    delta = ga.apply_mask(model, ga.Mask.build(model, {"model.norm.weight": torch.arange(3)}))
    assert listeners() == others + 1
    delta.remove()
    assert listeners() == others
    with ga.weaken_knowledge(model, drop=0.1):
        assert listeners() == others  # nothing changes over training
    with ga.weaken_knowledge(model, drop=ga.Ramp(end=0.1), total_steps=10) as handle:
        assert listeners() == others + 1
    assert listeners() == others
    assert handle.removed
    ga.attach(model, "attention-only", batch)
    assert listeners() > others
    del model, adapters, delta, handle
    assert listeners() == others
