"""Attacks the library with damaged input, and reports every answer that is not as promised.

A format is a file `mutate_NAME.py` beside this one, with two functions:

- `prepare(folder)` writes whole, valid input, once for each process.
- `attack(random, valid, folder)` writes a damaged copy of it into an empty folder and returns an `Attack`. All its
  choices come from `random`, so a seed names a case.

Each case runs in a process that ran others before it, which is killed if it does not answer. Run more of them, or a
single one again, with `python tests/attack --help`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import processes

from gatedadapters.errors import GatedAdaptersError

HERE = Path(__file__).parent
PARTS = ("where", "fix")  # of a message: the place and the remedy
SECONDS = 2.0  # of processor time: other programs on the machine do not count
SILENCE = 120.0  # seconds of wall time after which a process that does not answer counts as hanging
MEMORY = 200 * 2**20  # bytes above what the process held when the case began
_CEILING = 4 * 2**30  # bytes of address space beyond the start that the system grants at most: spares the machine


@dataclass(frozen=True)
class Attack:
    """One case.

    Attributes:
        what: what was damaged, for the report.
        call: what a user does with the input.
        is_right: whether a result without an error is the right one. Default: every result is.
    """

    what: str
    call: Callable[[], object]
    is_right: Callable[[Any], bool] | None = None


@dataclass(frozen=True)
class Fault:
    """An answer that is not as promised."""

    format: str
    seed: int
    what: str
    problem: str

    def __str__(self) -> str:
        return f"{self.format} {self.seed}: {self.what}\n    {self.problem}"


@dataclass(frozen=True)
class Answers:
    """All answers to the cases of one format.

    Attributes:
        refused: cases that ended in an error of the library, with place and remedy.
        accepted: cases with a result.
        faults: all others.
        seconds: most processor time that a case took.
        memory: most bytes that a case took beyond the start.
    """

    refused: int
    accepted: int
    faults: tuple[Fault, ...]
    seconds: float
    memory: int

    def __str__(self) -> str:
        lines = [
            f"{self.refused} refused, {self.accepted} accepted, {len(self.faults)} faults; "
            f"at most {self.seconds:.2f} s and {self.memory / 2**20:.0f} MB"
        ]
        return "\n".join([*lines, *map(str, self.faults)])


def formats() -> list[str]:
    """The formats that can be attacked."""
    return sorted(path.stem.removeprefix("mutate_") for path in HERE.glob("mutate_*.py"))


def run(name: str, seeds: Sequence[int], workers: int = 2) -> Answers:
    """Run the cases of one format, and report.

    Args:
        name: the format.
        seeds: one for each case.
        workers: number of processes.
    """
    waiting = list(reversed(seeds))
    faults: list[Fault] = []
    tally = {"refused": 0, "accepted": 0}
    most = [0.0, 0]
    open_: dict[Any, _Worker] = {}

    def start() -> None:
        worker = _Worker(name)
        open_[worker.pipe] = worker

    for _ in range(min(workers, len(seeds))):
        start()
    try:
        while open_:
            ready = connection.wait(list(open_), timeout=1.0)
            for pipe in list(open_):
                worker = open_[pipe]
                answer = worker.answer() if pipe in ready else None
                problem = worker.silent_for(SILENCE) if answer is None else None
                if problem is not None:
                    faults.append(Fault(name, worker.seed, worker.what, problem))
                    worker.kill()
                    del open_[pipe]
                    if waiting and worker.seed >= 0:
                        start()
                elif answer is not None:
                    kind, seconds, memory, what, text = answer
                    worker.what = what
                    if kind == "begun":
                        continue
                    if kind == "fault":
                        faults.append(Fault(name, worker.seed, what, text))
                    elif kind in tally:
                        tally[kind] += 1
                        most = [max(most[0], seconds), max(most[1], memory)]
                    if waiting:
                        worker.ask(waiting.pop())
                    else:
                        worker.stop()
                        del open_[pipe]
    finally:
        for worker in open_.values():
            worker.kill()
    return Answers(tally["refused"], tally["accepted"], tuple(faults), most[0], int(most[1]))


def command(*arguments: str) -> int:
    """What `gatedadapters ARGUMENTS` does; what it prints is checked.

    Returns:
        The exit code.

    Raises:
        RefusedError: the command refused its input, as promised.
        AssertionError: the exit code is neither 0 nor 2, or the message lacks a place or a remedy.
    """
    from gatedadapters.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    printed = err.getvalue()
    assert code in {0, 2}, f"exit code {code}\n{printed}"
    assert "Traceback" not in printed, printed
    if code == 2:
        raise RefusedError(printed, *(re.search(rf"^ *{part}: ", printed, re.MULTILINE) is not None for part in PARTS))
    return code


class RefusedError(Exception):
    """A command refused its input.

    Args:
        message: what it printed.
        has_place: whether the message says where the problem is.
        has_remedy: whether it says what to do.
    """

    def __init__(self, message: str, has_place: bool, has_remedy: bool) -> None:
        super().__init__(message)
        self.message, self.has_place, self.has_remedy = message, has_place, has_remedy


def judge(attack: Attack) -> tuple[str, str]:
    """What comes of one case: `refused`, `accepted` or `fault`, and the message."""
    try:
        result = attack.call()
    except (GatedAdaptersError, RefusedError) as error:
        if isinstance(error, RefusedError):
            place, remedy, text = error.has_place, error.has_remedy, error.message
        else:
            place, remedy, text = error.where is not None, error.fix is not None, str(error)
        missing = [name for name, found in (("place", place), ("remedy", remedy)) if not found]
        return ("fault", f"no {' and no '.join(missing)}: {text[:2000]}") if missing else ("refused", text)
    except BaseException as error:
        frames = "".join(traceback.format_exception(error, limit=-4))
        return "fault", f"{type(error).__name__}\n{frames[-3000:]}"
    if attack.is_right is not None and not attack.is_right(result):
        return "fault", f"another result, without an error: {str(result)[:500]}"
    return "accepted", ""


class _Worker:
    """A process that answers cases, seen from outside."""

    def __init__(self, name: str) -> None:
        self.pipe, theirs = processes.CONTEXT.Pipe()
        self.process = processes.start(answer_all, name, theirs)
        theirs.close()
        self.seed, self.what, self.asked = -1, "the start of the process", time.monotonic()

    def ask(self, seed: int) -> None:
        self.seed, self.what, self.asked = seed, "(not written yet)", time.monotonic()
        self.pipe.send(seed)

    def answer(self) -> Any:
        """The next message; None if the process has ended."""
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join(5)
            self.asked = -1e9
            return None

    def silent_for(self, seconds: float) -> str | None:
        if self.asked == -1e9:
            return f"the process ended with exit code {self.process.exitcode}"
        if time.monotonic() - self.asked > seconds + (60 if self.seed < 0 else 0):
            return f"no answer within {seconds:g} s"
        return None

    def stop(self) -> None:
        self.pipe.send(None)
        self.process.join(10)
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def answer_all(name: str, pipe: Any) -> None:
    """The work of one process: answer the cases that the pipe names until it names none."""
    sys.path.insert(0, str(HERE))
    logging.getLogger("gatedadapters").setLevel(logging.ERROR)  # artefacts without digests load with a note
    mutator = importlib.import_module(f"mutate_{name}")
    with tempfile.TemporaryDirectory() as place:
        valid = Path(place) / "valid"
        valid.mkdir()
        mutator.prepare(valid)
        _limit_memory()
        pipe.send(("ready", 0.0, 0, "", ""))
        while (seed := pipe.recv()) is not None:
            folder = Path(place) / "case"
            folder.mkdir()
            with contextlib.chdir(folder):
                attack = mutator.attack(random.Random(f"{name} {seed}"), valid, folder)
                pipe.send(("begun", 0.0, 0, attack.what, ""))
                with _measured() as spent:
                    kind, text = judge(attack)
            seconds, memory = spent
            if kind != "fault" and seconds > SECONDS:
                kind, text = "fault", f"{seconds:.1f} s of processor time"
            if kind != "fault" and memory > MEMORY:
                kind, text = "fault", f"{memory / 2**20:,.0f} MB beyond the start"
            pipe.send((kind, seconds, memory, attack.what, text))
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _measured() -> Iterator[list[Any]]:
    """Measures processor time and, on Linux, the peak of resident memory above the start."""
    spent: list[Any] = []
    before = _reset_peak()
    start = time.process_time()
    yield spent
    seconds = time.process_time() - start
    spent += [seconds, max(0, _status("VmHWM") - before)]


def _reset_peak() -> int:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    """A size of this process in bytes; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _limit_memory() -> None:
    held = _status("VmSize")
    if held and os.name == "posix":
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (held + _CEILING, hard))
