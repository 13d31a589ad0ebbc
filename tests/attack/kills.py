"""Kills processes at random moments, and looks for what is lost, doubled or differs: `python tests/attack --kills 200`.

Each process is forked from this one and ended by SIGKILL a random moment after it began, or a random moment after it
said that it is about to write. In the scenario "launches" it is one of two that train together.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from mutate_artefacts import encoder, same, tuned, tuned_elements
from torch import nn

import gatedadapters as ga
from benchmarks.costs import sharding
from gatedadapters import safe_files
from gatedadapters.continual import StreamResult, runner
from gatedadapters.continual.states import digest
from gatedadapters.errors import ArtifactError
from gatedadapters.testing.streams import TRAINING, CountingCollate, tiny_classifier, tiny_tasks

STRATEGIES = ("random", "sequential", "o_lora", "per_task")


class Killer:
    """Runs functions in processes, and kills each at a random moment."""

    def __init__(self, seed: int) -> None:
        self.random, self.kills = random.Random(seed), 0

    def run(self, work: Callable[[Callable[[], None]], object], within: float) -> bool:
        """Run `work` in a process, and kill it.

        Args:
            work: called with a function that says that something is about to be written.
            within: seconds after the start, or after what was said, in which the kill comes.

        Returns:
            Whether the process ended by itself, before it was killed.
        """
        said, say = os.pipe()
        child = os.fork()
        if not child:
            code = 1
            try:
                with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                    work(lambda: os.write(say, b"."))
                code = 0
            finally:
                os._exit(code)
        os.close(say)
        try:
            for _ in range(self.random.choice([0, 1, 1, 1, 2, 3])):
                os.read(said, 1)
            deadline = time.monotonic() + self.random.random() * within
            while time.monotonic() < deadline:
                if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    break
                time.sleep(0.0005)
        finally:
            os.close(said)
            os.kill(child, signal.SIGKILL)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in {0, -signal.SIGKILL}, f"the process failed with exit code {status}"
        self.kills += status != 0
        return status == 0


def saves(killer: Killer, folder: Path, kills: int) -> Iterator[str]:
    """Adapters, a delta and a joint artefact are overwritten again and again."""
    model = encoder()
    made: dict[str, list[tuple[Any, Callable[..., object]]]] = {"adapters": [], "delta": []}
    for scale in (1.0, 2.0):
        adapters = tuned(model, scale)
        adapters.save(folder / f"whole-{scale}")
        ga.detach(model)
    variants = [ga.load_adapters(m := encoder(), folder / f"whole-{scale}") and m for scale in (1.0, 2.0)]
    for other, scale in zip(variants, (1.0, 2.0), strict=True):
        made["adapters"].append((_bits(folder / f"whole-{scale}"), ga.get_adapters(other).save))
        delta = tuned_elements(other, scale)
        delta.save(folder / f"delta-{scale}")
        made["delta"].append((_bits(folder / f"delta-{scale}"), delta.save))
    goal = killer.kills + kills
    while killer.kills < goal:
        name = killer.random.choice(list(made))
        target = folder / "out" / name
        (_, first), (_, second) = made[name]

        def work(say: Callable[[], None], target: Path = target, first: Any = first, second: Any = second) -> None:
            while True:
                say()
                first(target, overwrite=True)
                say()
                second(target, overwrite=True)

        killer.run(work, within=0.03)
        if target.exists():
            if _bits(target) not in [bits for bits, _ in made[name]]:
                yield f"{name}: the folder is neither the old nor the new one"
            reader = ga.load_adapters if name == "adapters" else ga.load_delta
            plain = encoder()
            (undo := reader(plain, target)) and (undo.detach() if name == "adapters" else undo.remove())
        first(target, overwrite=True)
        if safe_files.leftovers(target):
            yield f"{name}: the next save left {safe_files.leftovers(target)}"


def shelves(killer: Killer, folder: Path, kills: int) -> Iterator[str]:
    """A shelf adds and removes; a save of another process goes on meanwhile."""
    model = encoder()
    for name, scale in (("a", 1.0), ("b", 2.0)):
        tuned(model, scale).save(folder / name)
        ga.detach(model)
    before, bits = digest(model), _bits(folder)
    goal = killer.kills + kills
    while killer.kills < goal:

        def work(say: Callable[[], None]) -> None:
            shelf = ga.Shelf.load(model, {"a": folder / "a"})
            while True:
                say()
                shelf.add("b", folder / "b")
                shelf.activate("b")
                shelf.remove("b")

        killer.run(work, within=0.02)
        if _bits(folder) != bits or digest(model) != before:
            yield "a killed shelf changed what it read"
    shelf = ga.Shelf.load(model, {"a": folder / "a", "b": folder / "b"})
    shelf.detach()


def streams(killer: Killer, folder: Path, kills: int) -> Iterator[str]:
    """Streams are killed while they train and while a stage ends, and go on until they are finished."""
    kinds = STRATEGIES[: max(1, kills // 10)]
    whole = {kind: _stream(folder / f"{kind}-whole", kind) for kind in kinds}
    goal, number = killer.kills + kills, 0
    while killer.kills < goal:
        kind = kinds[number % len(kinds)]
        number += 1
        place = folder / f"{kind}-{number}"
        within = killer.random.choice([0.02, 0.3])
        while not killer.run(lambda say, place=place, kind=kind: _stream(place, kind, say), within):
            if killer.kills >= goal:
                _stream(place, kind)
                break
        result = StreamResult.load(place)
        if not same(_comparable(result), whole[kind]):
            yield f"{kind}: the stream that was killed has other results"
        hidden = [*place.rglob(".*"), *place.glob("running*")]
        if hidden:
            yield f"{kind}: the finished stream left {hidden}"
        for state in range(len(result.stages), -1, -1) if kind == "random" else ():
            model = tiny_classifier()
            result.restore(model, state)


def _stream(folder: Path, kind: str, say: Callable[[], None] | None = None) -> Any:
    options = {"kind": kind, "core": {"granularity": "element"}} if kind == "random" else {"kind": kind}
    with _said_at_stage_ends(say):
        training = TRAINING.model_copy(update={"checkpoint_steps": 1})
        model: nn.Module = tiny_classifier()
        return _comparable(
            ga.run_stream(model, tiny_tasks(CountingCollate()), options, training=training, folder=folder)
        )


def _comparable(result: StreamResult) -> Any:
    stages = [(stage.task, stage.scores, stage.elements, stage.bytes, stage.state) for stage in result.stages]
    return result.baseline.scores, stages, result.record.base


@contextmanager
def _said_at_stage_ends(say: Callable[[], None] | None) -> Iterator[None]:
    """Within this context a stage that is about to be stored says so."""
    finish = runner.StreamRunner._finish_stage

    def finish_and_say(self: Any, *arguments: Any) -> None:
        if say is not None:
            say()
        finish(self, *arguments)

    runner.StreamRunner._finish_stage = finish_and_say  # type: ignore[method-assign]
    try:
        yield
    finally:
        runner.StreamRunner._finish_stage = finish  # type: ignore[method-assign]


def rivals(killer: Killer, folder: Path, kills: int) -> Iterator[str]:
    """Two processes run one stream: one wins, the other is told; a save beside a living one leaves it alone."""
    for number in range(max(1, kills // 10)):
        place = folder / f"rivals-{number}"
        outcomes: list[int] = []
        children = []
        for _ in range(2):
            child = os.fork()
            if not child:
                code = 3
                try:
                    _stream(place, "sequential")
                    code = 0
                except ArtifactError as error:
                    code = 2 if "another process is writing this stream" in str(error) else 3
                finally:
                    os._exit(code)
            children.append(child)
        outcomes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
        if outcomes not in ([0, 2], [0, 0]):  # [0, 0]: the second began when the first had ended
            yield f"two processes on one stream ended with exit codes {outcomes}"
        if not same(_comparable(StreamResult.load(place)), _stream(folder / f"alone-{number}", "sequential")):
            yield "two processes on one stream gave other results"
    target = folder / "shared"
    with safe_files.whole_folder(target, files={"a"}) as living:
        (living / "a").write_text("mine")
        child = os.fork()
        if not child:
            with safe_files.whole_folder(target, files={"a"}) as new:
                (new / "a").write_text("theirs")
            os._exit(0)
        os.waitpid(child, 0)
        if not (living / "a").exists():
            yield "a save removed the hidden folder of a process that lives"
        (target / "a").unlink()


def launches(killer: Killer, folder: Path, kills: int) -> Iterator[str]:
    """One of two processes that search together under FSDP2 is killed; the run goes on from its last checkpoint."""
    undisturbed, seconds = sharding.undisturbed_search(folder / "undisturbed")
    goal, number = killer.kills + max(1, kills), 0
    while killer.kills < goal:
        number += 1
        victim, after = killer.random.randrange(2), killer.random.random() * seconds
        told = sharding.killed_and_resumed(folder / str(number), victim=victim, after=after)
        if told is None:
            continue
        killer.kills += 1
        others_ended, resumed = told
        if not others_ended:
            yield f"process {1 - victim} ended without an error when process {victim} was killed after {after:.2f} s"
        if resumed != undisturbed:
            yield f"process {victim} was killed after {after:.2f} s, and the resumed run ended with other bits"


SCENARIOS = {
    "saves": (saves, 0.5),
    "shelves": (shelves, 0.2),
    "streams": (streams, 0.25),
    "launches": (launches, 0.05),
    "rivals": (rivals, 0.1),
}


def _bits(folder: Path) -> str:
    """A digest of everything in a folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


def run(kills: int, seed: int = 0, only: Sequence[str] = tuple(SCENARIOS)) -> int:
    """Run scenarios, and print a line for each, and every fault.

    Args:
        kills: how many in all scenarios together.
        seed: of the moments.
        only: the scenarios to run; each with its own share of the kills.

    Returns:
        How many faults there were.
    """
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)  # a forked process has no others
    killer, faults = Killer(seed), 0
    for name in only:
        scenario, share = SCENARIOS[name]
        before, start = killer.kills, time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found = list(scenario(killer, Path(folder), round(kills * share)))
        seconds = time.monotonic() - start
        print(f"{name}: {killer.kills - before} kills, {len(found)} faults, {seconds:.0f} s", flush=True)
        for fault in found:
            print(f"    {fault}")
        faults += len(found)
    return faults
