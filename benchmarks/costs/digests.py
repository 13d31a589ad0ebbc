"""What the digest check adds to loading 100 MB of adapters.

Claim under test: it adds at most 3 % to the time of loading.

    python -m benchmarks digests run [--rounds 15]
    python -m benchmarks digests table

Both sides take turns, each load in a process of its own. The file is in the cache of the system, so that reading is as
fast, and the check as dear, as it gets. Every `run` measures anew.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import gatedadapters as ga
from benchmarks.common.command import carry_out, parser
from benchmarks.common.store import Result, Store
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Store("digests")
NAME = "load"  # of the only result
RANK = 160  # of a LoRA at every map of a BERT base: 106 MB


def backbone() -> torch.nn.Module:
    """A random BERT of base size with a small vocabulary."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=2000)).eval()


def save(folder: Path) -> int:
    """Write the adapters; returns the bytes of the weights."""
    model = backbone()
    space = ga.SearchSpace.parse({"name": "wide", "paths": [{"kind": "lora", "rank": RANK}]}, where="digests")
    adapters = ga.attach(model, space)
    adapters.compact(adapters.discretize(scores=torch.ones_like(adapters.bank.kept)))
    adapters.save(folder)
    return (folder / "adapters.safetensors").stat().st_size


def seconds_to_load(folder: Path, verify: bool) -> tuple[float, float]:
    """Wall time and processor time of one load, in a forked process that has loaded nothing before."""
    receive, send = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if not child:
        model = backbone()
        wall, cpu = time.perf_counter(), time.process_time()
        ga.load_adapters(model, folder, verify=verify)
        send.send((time.perf_counter() - wall, time.process_time() - cpu))
        os._exit(0)
    os.waitpid(child, 0)
    found: tuple[float, float] = receive.recv()
    return found


def measure(rounds: int) -> Result:
    """Medians of both sides, and what the check adds."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        size = save(Path(place) / "adapters")
        sides: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for number in range(2 * rounds):
            verify = bool((number + number // 2) % 2)  # A B B A ...
            sides[verify].append(seconds_to_load(Path(place) / "adapters", verify))
    found: Result = {"bytes": size, "rounds": rounds, "versions": versions()}
    for part, index in (("wall", 0), ("cpu", 1)):
        checked, unchecked = (statistics.median(pair[index] for pair in sides[verify]) for verify in (True, False))
        found |= {f"{part}_ms": checked * 1e3, f"{part}_ms_unchecked": unchecked * 1e3}
        found[f"{part}_added"] = checked / unchecked - 1
    return found


def table() -> str:
    """One line for wall and one for processor time."""
    found = STORE.read(NAME)
    if found is None:
        return "not measured yet"
    rows = [
        [part, f"{found[f'{part}_ms']:.0f}", f"{found[f'{part}_ms_unchecked']:.0f}", f"{found[f'{part}_added']:+.1%}"]
        for part in ("wall", "cpu")
    ]
    return format_table(["time", "checked, ms", "unchecked, ms", "added"], rows)


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("digests", __doc__)
    made.add_argument("--rounds", type=int, default=15)
    options = made.parse_args(arguments)
    carry_out(options, run=lambda: STORE.write(NAME, measure(options.rounds)), table=table, pack=STORE.pack)
