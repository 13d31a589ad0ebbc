"""One clock of optimiser steps, for everything that has to happen once a step.

Gates draw noise once a step, a sparse delta writes its values into the weights after each, a ramp moves on by one. All
of them are *listeners* of `CLOCK`. While there is at least one listener, the clock has one hook before and one hook
after each step of every `torch.optim.Optimizer` of the process, so that a plain training loop needs no call of this
module. A process without listeners has no hooks: importing the package registers nothing. Listeners are held weakly,
and hear only of optimisers that hold a parameter they watch.

Whoever makes an optimiser can also hand it in before the first forward pass (`StepClock.training_begins`). The Trainers
of this package do so; listeners then take up what the optimiser's loaded state says.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle


class Turn(IntEnum):
    """The order in which listeners hear of a step; within one turn, the order in which they were added.

    The processes of a distributed run need the same order, because gates exchange values between processes.
    """

    DELTA = 0
    """A sparse delta checks its weights before a step and writes its values into them after it."""
    GATES = 1
    """The gates end their step: they gather saliency, and the next forward pass draws new noise."""
    PRUNE = 2
    """The gates are fixed to a Structure if the schedule says so."""
    RAMP = 3
    """Probabilities that change over training move on."""


class StepListener:
    """Something that happens at optimiser steps, from `CLOCK.add(self)` on. Events that are not overridden do nothing.

    A listener that is copied or pickled along with its model has to add the copy itself, in `__setstate__`.
    """

    turn: ClassVar[Turn]

    def watched(self) -> Iterable[Tensor]:
        """The parameters of this listener. It hears of the optimisers that hold at least one of them.

        Called when an optimiser is seen for the first time, and again when the optimiser's parameters have changed. A
        listener whose own parameters change must be discarded and added again.
        """
        raise NotImplementedError

    def training_begins(self, optimizer: Optimizer) -> None:
        """An optimiser was handed in with its state loaded; no forward pass has run since."""

    def before_step(self, optimizer: Optimizer) -> None:
        """The optimiser is about to step. It does not if this raises an error."""

    def after_step(self, optimizer: Optimizer | None) -> None:
        """The optimiser has stepped. None stands for an optimiser that is no torch optimiser (`StepClock.stepped`)."""


@dataclass(frozen=True)
class _Entry:
    listener: ref[StepListener]
    turn: Turn
    number: int  # counts additions
    hears_before: bool


@dataclass(frozen=True)
class _Seen:
    """What is known of an optimiser: the ids of its parameters and, by number of a listener, those it watches."""

    ids: list[int]
    watched: dict[int, list[ref[Tensor]]] = field(default_factory=dict)


class StepClock:
    """Tells listeners of optimiser steps. There is one clock, `CLOCK`."""

    def __init__(self) -> None:
        self._entries: tuple[_Entry, ...] = ()  # replaced, never changed: iteration needs no lock
        self._seen: WeakKeyDictionary[Optimizer, _Seen] = WeakKeyDictionary()
        self._handles: list[RemovableHandle] = []
        self._numbers = itertools.count()
        self._under_way = 0  # hooks that are running, in all threads
        self._lock = threading.RLock()  # reentrant, since garbage collection may run `_forget` at any point

    # -- listeners -----------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether torch's hooks are registered."""
        return bool(self._handles)

    def add(self, listener: StepListener) -> None:
        """Tell `listener` of steps from now on, as the last one of its turn. A listener that was added stays where it
        is.
        """
        with self._lock:
            if all(entry.listener() is not listener for entry in self._entries):
                hears_before = type(listener).before_step is not StepListener.before_step
                entry = _Entry(ref(listener, self._forget), listener.turn, next(self._numbers), hears_before)
                self._replace((*self._entries, entry))

    def discard(self, listener: StepListener) -> None:
        """Tell `listener` of no further step."""
        with self._lock:
            self._replace(entry for entry in self._entries if entry.listener() is not listener)

    def _forget(self, dead: ref[StepListener]) -> None:
        with self._lock:
            self._replace(entry for entry in self._entries if entry.listener is not dead)

    def _replace(self, entries: Iterable[_Entry]) -> None:
        self._entries = tuple(sorted(entries, key=lambda entry: (entry.turn, entry.number)))
        if self._entries and not self._handles:
            before, after = register_optimizer_step_pre_hook, register_optimizer_step_post_hook
            self._handles = [before(self._before_step), after(self._after_step)]
        elif not self._entries and not self._under_way:  # torch is not iterating over its hooks
            while self._handles:
                self._handles.pop().remove()

    # -- steps ---------------------------------------------------------------------------------------------------------

    def training_begins(self, optimizer: Optimizer) -> None:
        """Hand in an optimiser before the first forward pass, with its state loaded if there is any to load."""
        optimizer = unwrapped(optimizer)
        for listener in self._listeners(optimizer, self._entries):
            listener.training_begins(optimizer)

    def stepped(self, parameters: Iterable[Tensor]) -> None:
        """Say that `parameters` made a step without a torch optimiser."""
        ids = {id(parameter) for parameter in parameters}
        for entry in self._entries:
            listener = entry.listener()
            if listener is not None and any(id(parameter) in ids for parameter in listener.watched()):
                listener.after_step(None)

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within this context no listener hears of a step: torch makes one of zeros before it loads a state."""
        entries, self._entries = self._entries, ()
        try:
            yield
        finally:
            self._entries = entries

    def shared(self, listener: StepListener, optimizer: Optimizer) -> Iterator[Tensor]:
        """The parameters that `listener` watches and `optimizer` holds."""
        seen = self._look_at(optimizer)
        for entry in self._entries:
            if entry.listener() is listener:
                yield from (p for held in self._watched(seen, entry, listener) if (p := held()) is not None)

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entries = [entry for entry in self._entries if entry.hears_before]
        if entries:
            self._tell(optimizer, entries, lambda listener: listener.before_step(optimizer))

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tell(optimizer, self._entries, lambda listener: listener.after_step(optimizer))

    def _tell(self, optimizer: Optimizer, entries: Iterable[_Entry], tell: Callable[[StepListener], None]) -> None:
        with self._lock:
            self._under_way += 1
        try:
            for listener in self._listeners(optimizer, entries):
                tell(listener)
        finally:
            with self._lock:
                self._under_way -= 1

    def _listeners(self, optimizer: Optimizer, entries: Iterable[_Entry]) -> list[StepListener]:
        seen, found = self._look_at(optimizer), []
        for entry in entries:
            listener = entry.listener()
            if listener is not None and self._watched(seen, entry, listener):
                found.append(listener)
        return found

    def _look_at(self, optimizer: Optimizer) -> _Seen:
        """What is known of `optimizer`; nothing, if its parameters are not those it had when it was last seen."""
        ids = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
        seen = self._seen.get(optimizer)
        if seen is None or seen.ids != ids:
            seen = self._seen[optimizer] = _Seen(ids)
        return seen

    @staticmethod
    def _watched(seen: _Seen, entry: _Entry, listener: StepListener) -> list[ref[Tensor]]:
        if entry.number not in seen.watched:
            ids = set(seen.ids)
            seen.watched[entry.number] = [ref(parameter) for parameter in listener.watched() if id(parameter) in ids]
        return seen.watched[entry.number]


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """Torch's optimiser, which `accelerate` wraps in another one."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, Optimizer) else optimizer


CLOCK = StepClock()
