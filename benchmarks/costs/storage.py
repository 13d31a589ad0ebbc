"""Does a study lose or repeat trials under eight workers, one of them killed, and what does its storage cost?

Claims under test: eight processes on one journal, and on PostgreSQL, run every trial exactly once; a worker killed with
SIGKILL has its trial marked and run again; over 200 short trials a storage costs a small part of a second a trial.

    python -m benchmarks storage run [--workers 8] [--postgresql URL]
    python -m benchmarks storage table

Without a URL a PostgreSQL server of its own is started where one is installed. Where the cost of a storage is measured,
trials take no time of their own, and the storages take turns.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from benchmarks.common.command import carry_out, parser
from benchmarks.common.postgresql import binaries, running_server
from benchmarks.common.store import Result, Store
from gatedadapters.config import SearchConfig, StudyConfig
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions
from gatedadapters.studies import Measured, Study

STORE = Store("storage")
NAME = "workers"  # of the only result
MARKER, PAUSE = "STUDY_STORAGE_MARKER", 0.1
FACTORS = {"noise.ratio": {"low": 0.0, "high": 1.0, "points": 10}}
SEARCH = {"model": "none", "tasks": [{"train": "none.csv"}], "noise": {"kind": "label", "ratio": 0}}


def config(name: str, seeds: int) -> StudyConfig:
    """Ten trials for each seed."""
    data = {"name": name, "search": SEARCH, "factors": FACTORS, "seeds": list(range(seeds))}
    return StudyConfig.parse(data, where="benchmark")


def short(search: SearchConfig, *args: Any, **kwargs: Any) -> Measured:
    """A trial of no time at all."""
    return Measured({"task": 0.5}, (), 1, 0.0)


def killed_once(search: SearchConfig, *args: Any, **kwargs: Any) -> Measured:
    """A short trial; the process that comes first to the 30th kills itself."""
    marker = Path(os.environ[MARKER])
    time.sleep(PAUSE)
    if search.training.seed == 3:
        with contextlib.suppress(FileExistsError):
            marker.open("x").close()
            os.kill(os.getpid(), signal.SIGKILL)
    return short(search)


def together(storage: str | Path, workers: int) -> dict[str, Any]:
    """Eight workers, 100 trials, one SIGKILL."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[MARKER] = f"{folder}/marker"
        began = time.perf_counter()
        study = Study(config(f"together {time.time_ns()}", 10), storage=storage, measure=killed_once)
        study.run(workers=workers)
    by_state = {state: [t for t in study.trials if t.state == state] for state in TrialState}
    keys = [trial.user_attrs["key"] for trial in by_state[TrialState.COMPLETE]]
    planned = [job.key for job in study._jobs()]
    killed = by_state[TrialState.FAIL]
    return {
        "planned": len(planned),
        "complete": len(keys),
        "lost": len(set(planned) - set(keys)),
        "duplicated": len(keys) - len(set(keys)),
        "killed": len(killed),
        "killed and run again": sum(trial.user_attrs["key"] in keys for trial in killed),
        "processes": len({trial.user_attrs["owner"]["pid"] for trial in study.trials}),
        "seconds": round(time.perf_counter() - began, 1),
    }


def overhead(storages: dict[str, Any], rounds: int = 4) -> dict[str, tuple[float, float]]:
    """(ms of wall time, ms of this process's CPU time) a trial, by storage: medians over rounds of 50 trials."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in storages}
    for index in range(rounds):
        for name, storage in storages.items():
            study = Study(config(f"overhead {index} {time.time_ns()}", 5), storage=storage, measure=short)
            wall, cpu = time.perf_counter(), time.process_time()
            study.run()
            each = 1000 / len(study.trials)
            found[name].append(((time.perf_counter() - wall) * each, (time.process_time() - cpu) * each))
    return {
        name: (round(statistics.median(w for w, _ in times), 1), round(statistics.median(c for _, c in times), 1))
        for name, times in found.items()
    }


@contextlib.contextmanager
def server(url: str | None) -> Iterator[str | None]:
    """The URL given, else that of a server of our own, else None."""
    if url is not None:
        yield url
        return
    if binaries() is None:
        yield None
        return
    with running_server() as own:
        yield own


def measure(workers: int, postgresql: str | None) -> Result:
    """Workers on every storage that they can share, then the cost of every storage."""
    with tempfile.TemporaryDirectory() as folder, server(postgresql) as url:
        shared: dict[str, str | Path] = {"journal": Path(folder) / "study.journal"}
        if url is not None:
            shared["postgresql"] = url
        found = {name: together(storage, workers) for name, storage in shared.items()}
        alone = {"memory": InMemoryStorage(), "sqlite": f"sqlite:///{folder}/study.db", **shared}
        return {
            "versions": versions(),
            "workers": workers,
            "together": found,
            "ms and CPU ms a trial": overhead(alone),
        }


def table() -> str:
    """What became of the trials, what a storage costs, and whether the claim holds; nothing where nothing is stored."""
    result = STORE.read(NAME)
    if result is None:
        return ""
    workers, cost = result["together"], result["ms and CPU ms a trial"]
    names = list(next(iter(workers.values())))
    whole = all(v["complete"] == v["planned"] and not v["lost"] and not v["duplicated"] for v in workers.values())
    whole &= all(v["killed"] == v["killed and run again"] == 1 for v in workers.values())
    return "\n".join(
        [
            format_table(["storage", *names], [[k, *(str(v[n]) for n in names)] for k, v in workers.items()]),
            "",
            format_table(["storage", "ms a trial", "CPU ms"], [[name, *map(str, ms)] for name, ms in cost.items()]),
            f"nothing lost, nothing twice, the killed trial run again: {'holds' if whole else 'DOES NOT HOLD'}",
        ]
    )


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("storage", __doc__)
    made.add_argument("--workers", type=int, default=8)
    made.add_argument("--postgresql", help="URL of a database; default: a server of its own, where one is installed")
    options = made.parse_args(arguments)
    carry_out(
        options,
        run=lambda: STORE.write(NAME, measure(options.workers, options.postgresql)),
        table=table,
        pack=STORE.pack,
    )
