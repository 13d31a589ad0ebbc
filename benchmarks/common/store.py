"""Results of a benchmark: loose files while processes compute them, one packed file in the repository.

A process writes each result as one JSON file under `benchmarks/scratch/cells/`, which git ignores. `pack` moves these
results into `benchmarks/results/NAME.jsonl`, one line a result, sorted by name. Reading looks into both, so a study
that goes on after packing repeats nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1]
SCRATCH = BENCHMARKS / "scratch"  # everything that git ignores
Result = dict[str, Any]


class Store:
    """The results of one benchmark by name.

    Args:
        benchmark: its name, which is also that of the packed file.
        summary: what is kept of a result when it is packed; by default everything.
        root: the folder of `results/` and `scratch/`.
    """

    def __init__(self, benchmark: str, *, summary: Callable[[Result], Result] = dict, root: Path = BENCHMARKS) -> None:
        self.benchmark, self.summary, self.root = benchmark, summary, root
        self._cache: tuple[object, dict[str, Result]] = (None, {})

    @property
    def packed(self) -> Path:
        """The file of packed results."""
        return self.root / "results" / f"{self.benchmark}.jsonl"

    @property
    def loose(self) -> Path:
        """The folder of results that are not packed yet."""
        return self.root / "scratch" / "cells" / self.benchmark

    def read(self, name: str) -> Result | None:
        """A result, or None if it has not been computed."""
        # First the loose file: `pack` removes it only after the packed file holds the result.
        try:
            return _read(self.loose / f"{name}.json")
        except FileNotFoundError:
            found = self._packed().get(name)
            return None if found is None else dict(found)

    def write(self, name: str, result: Result) -> None:
        """Write a result as a loose file; it replaces an earlier one."""
        write_whole(self.loose / f"{name}.json", json.dumps(result, indent=1) + "\n")

    def computed(self, name: str, compute: Callable[[], Result]) -> Result:
        """The stored result if there is one; otherwise `compute` makes it, and it is stored."""
        found = self.read(name)
        if found is None:
            self.write(name, compute())
            found = _read(self.loose / f"{name}.json")
        return found

    def results(self) -> dict[str, Result]:
        """All results, packed and loose, sorted by name."""
        loose = {file.name.removesuffix(".json"): _read(file) for file in self.loose.glob("*.json")}
        return dict(sorted((self._packed() | loose).items()))

    def pack(self) -> str:
        """Move all loose results into the packed file, and say how many it holds then."""
        with locked(self.loose / "lock"):
            files = list(self.loose.glob("*.json"))
            fresh = {file.name.removesuffix(".json"): self.summary(_read(file)) for file in files}
            results = dict(sorted((self._packed() | fresh).items()))
            if fresh:
                lines = (json.dumps({"name": name, **found}, separators=(",", ":")) for name, found in results.items())
                write_whole(self.packed, "".join(f"{line}\n" for line in lines))
            for file in files:
                file.unlink()
        return f"{self.packed.name}: {len(results)} results, {len(fresh)} of them packed now"

    def _packed(self) -> dict[str, Result]:
        """The packed results by name, read again whenever the file is another one than last time."""
        if not self.packed.exists():
            return {}
        state = self.packed.stat()
        version = (self.packed, state.st_ino, state.st_mtime_ns, state.st_size)
        if self._cache[0] != version:
            rows = [json.loads(line) for line in self.packed.read_text(encoding="utf-8").splitlines()]
            self._cache = version, {row.pop("name"): row for row in rows}
        return self._cache[1]


def write_whole(path: Path, text: str) -> None:
    """Write a file that other processes see whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes that lock the same file waiting until the block ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process is the one that works on something until the block ends; False if another one already does.

    Args:
        path: a file that stands for the work; it is gone afterwards.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        path.unlink()


def _read(file: Path) -> Result:
    return dict(json.loads(file.read_text(encoding="utf-8")))
