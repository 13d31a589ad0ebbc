"""What the digest check adds to loading 100 MB of adapters: both sides in turn, each in a process of its own.

    python -m benchmarks.costs.digests [--rounds 15]

The file is in the cache of the system, so that reading is as fast, and the check as dear, as it gets.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

import gatedadapters as ga

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


def main() -> None:
    """Print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        size = save(Path(place) / "adapters")
        sides: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        for number in range(2 * rounds):
            verify = bool((number + number // 2) % 2)  # A B B A ...
            sides[verify].append(seconds_to_load(Path(place) / "adapters", verify))
    record: dict[str, float] = {"bytes": size, "rounds": rounds}
    for part, index in (("wall", 0), ("cpu", 1)):
        with_check, without = (statistics.median(pair[index] for pair in sides[verify]) for verify in (True, False))
        record |= {f"{part}_ms": with_check * 1e3, f"{part}_ms_unchecked": without * 1e3}
        record[f"{part}_added"] = with_check / without - 1
        best = [min(pair[index] for pair in sides[verify]) for verify in (True, False)]
        record[f"{part}_added_at_best"] = best[0] / best[1] - 1
    print(json.dumps(record))


if __name__ == "__main__":
    main()
