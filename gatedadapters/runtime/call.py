"""What one forward call of a model carries, kept with the call and not on the model.

A model may be shared by threads: a server, two generations, a data loader. Task ids, remembered inputs and chosen
adapters belong to one call, so they live in a `Call` that the thread running the forward holds; nothing of a call is
ever written on a module. Settings of the model, such as the task that is set or the adapters that are active, are read
once, when a call begins, and hold throughout it.

Why a thread-local and not a `contextvars.ContextVar`: a forward runs from start to end in one thread, where both mean
the same, and torch.compile traces reads of a thread-local (with guards) but not of a context variable.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor


class Call:
    """One forward call, as one attached set of adapters sees it.

    Attributes:
        runs: whether the paths run; False leaves the backbone alone.
        task: the task of every example, or of each example (batch,), as positions among the adapters' tasks; None where
            nothing says which.
        inputs: what modules read, by module name, remembered for paths that tap one module and write at another.
    """

    __slots__ = ("_tasks", "inputs", "runs", "task")

    def __init__(self, *, runs: bool, task: int | Tensor | None = None) -> None:
        self.runs, self.task = runs, task
        self.inputs: dict[str, Tensor] = {}
        self._tasks: tuple[int, ...] | None = None

    def tasks(self) -> tuple[int, ...]:
        """The distinct tasks of the batch, ascending; read from the device once a call."""
        if not isinstance(self.task, Tensor):
            return () if self.task is None else (self.task,)
        if self._tasks is None:
            self._tasks = tuple(self.task.unique().tolist())
        return self._tasks

    def same_as(self, other: Call) -> bool:
        """Whether another call has the same settings (task ids by identity)."""
        return type(self) is type(other) and self.runs == other.runs and self.task is other.task


class Owner(Protocol):
    """What calls are told apart by: adapters, or a shelf of them, in one model."""

    serial: int

    def call_outside(self) -> Call:
        """What holds for a part of the model that is called by itself, as `generate` calls an encoder."""


class _Local(threading.local):
    """Each thread's own calls, by the serial of their owner."""

    def __init__(self) -> None:
        self.now: dict[int, Call] = {}
        self.outer: dict[int, list[Call]] = {}  # calls that a call of the same model interrupted
        self.outside: dict[int, Call] = {}  # the last one made by `call_outside`


_LOCAL = _Local()
_TO_RECOMPUTE: dict[int, Call] = {}
"""The last call with gradients, by serial: a checkpointed block runs again during backward, on autograd's thread."""

_serials = itertools.count()


def new_serial(owner: object) -> int:
    """A key for the calls of `owner`, given up when `owner` is gone."""
    serial = next(_serials)
    weakref.finalize(owner, forget, serial)
    return serial


def forget(serial: int) -> None:
    """Drop what this thread, and recomputation, hold for an owner that is gone or detached."""
    _TO_RECOMPUTE.pop(serial, None)
    for calls in (_LOCAL.now, _LOCAL.outer, _LOCAL.outside):
        calls.pop(serial, None)


def begin(owner: Owner, call: Call) -> None:
    """From here to `end`, `call` is what this thread's hooks of `owner` see."""
    serial = owner.serial
    if serial in _LOCAL.now:
        _LOCAL.outer.setdefault(serial, []).append(_LOCAL.now[serial])
    _LOCAL.now[serial] = call
    if torch.is_grad_enabled():
        _TO_RECOMPUTE[serial] = call


def end(owner: Owner) -> None:
    """The call is over, whether it returned or raised."""
    serial = owner.serial
    call, outer = _LOCAL.now.pop(serial, None), _LOCAL.outer.get(serial)
    if call is not None:
        call.inputs.clear()
    if outer:
        _LOCAL.now[serial] = outer.pop()


def current(owner: Owner) -> Any:
    """The call that is under way in this thread, a `Call` or what the owner made of one.

    During backward, where a checkpointed block runs again, it is the last call with gradients; where a part of the
    model is called by itself it is what `owner.call_outside` says.
    """
    call = _LOCAL.now.get(owner.serial)
    return _without_a_call(owner) if call is None else call


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _without_a_call(owner: Owner) -> Call:
    recomputing = torch._C._current_graph_task_id() != -1  # inside a backward
    if recomputing and owner.serial in _TO_RECOMPUTE:
        return _TO_RECOMPUTE[owner.serial]
    new, known = owner.call_outside(), _LOCAL.outside.get(owner.serial)
    if known is not None and known.same_as(new):
        return known  # its hooks share the inputs that they remember
    _LOCAL.outside[owner.serial] = new
    return new


@contextmanager
def replaced(owner: Owner, call: Call) -> Iterator[None]:
    """Within this context this thread's hooks of `owner` see another call: a part of the batch, say."""
    before = _LOCAL.now.get(owner.serial)
    _LOCAL.now[owner.serial] = call
    try:
        yield
    finally:
        if before is None:
            del _LOCAL.now[owner.serial]
        else:
            _LOCAL.now[owner.serial] = before


_SWITCHED_OFF: ContextVar[frozenset[int]] = ContextVar("switched off", default=frozenset())


def is_switched_off(owner: Owner) -> bool:
    """Whether this thread or asyncio task is within `switched_off(owner)`."""
    return owner.serial in _SWITCHED_OFF.get()


@contextmanager
def switched_off(owner: Owner) -> Iterator[None]:
    """Within this context, in this thread or asyncio task alone, calls begin with nothing of `owner` at work."""
    token = _SWITCHED_OFF.set(_SWITCHED_OFF.get() | {owner.serial})
    try:
        yield
    finally:
        _SWITCHED_OFF.reset(token)
