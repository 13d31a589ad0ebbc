"""Does the same many times, and looks at the memory: `python tests/attack --long 10000`."""

from __future__ import annotations

import ctypes
import gc
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from itertools import count, pairwise
from pathlib import Path
from statistics import median

import torch
from mutate_artefacts import decoder, encoder, tuned, tuned_elements
from tiny_runs import save_tokenizer
from transformers import BertConfig, BertModel

import gatedadapters as ga
from gatedadapters.studies import Study

BYTES = 2 * 2**20  # growth of resident memory over the second half that still counts as none
POOLS = 16 * 2**20  # growth that counts even if it came at once
SETTLED = 250  # turns after which caches and the allocator's pools are full; memory of fewer is not judged
LOOKS = 5  # at the memory in the second half
OBJECTS = 100  # the same for objects of Python
RECORD = 25  # trials of a study before the next one


def training() -> Iterator[None]:
    """Steps of a gated training in a loop of one's own."""
    model = encoder().train()
    space = ga.SearchSpace.parse({"name": "small", "paths": [{"kind": "lora", "rank": 2}]}, where="long runs")
    adapters = ga.attach(model, space, penalty=ga.L0(weight=0.1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch = {"input_ids": torch.arange(12).reshape(2, 6), "labels": torch.tensor([0, 1])}
    while True:
        optimizer.zero_grad()
        (model(**batch).loss + adapters.penalty()).backward()
        optimizer.step()
        yield


def attaching() -> Iterator[None]:
    """Adapters are attached, run and detached; then elements are made trainable, and put back."""
    model = encoder()
    space = ga.SearchSpace.parse({"name": "small", "paths": [{"kind": "lora", "rank": 2}]}, where="long runs")
    while True:
        ga.attach(model, space)
        with torch.no_grad():
            model(input_ids=torch.arange(6)[None])
        ga.detach(model)
        tuned_elements(model, 1.0).remove()
        yield


def shelves() -> Iterator[None]:
    """A shelf adds adapters, runs with them and removes them."""
    model = decoder()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a", "b"):
            tuned(model, 1.0).save(Path(folder) / name)
            ga.detach(model)
        shelf = ga.Shelf.load(model, {"a": Path(folder) / "a"})
        while True:
            shelf.add("b", Path(folder) / "b")
            with torch.no_grad():
                model(input_ids=torch.arange(12).reshape(2, 6), adapter_names=["b", None])
            shelf.remove("b")
            yield


def saving() -> Iterator[None]:
    """Adapters are overwritten and loaded."""
    model, other = encoder(), encoder()
    adapters = tuned(model, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        while True:
            adapters.save(Path(folder) / "out", overwrite=True)
            ga.load_adapters(other, Path(folder) / "out").detach()
            yield


def trials() -> Iterator[None]:
    """Trials of a study, each a whole search on a model that is loaded for it.

    A new record is begun every `RECORD` trials: Optuna reads a record whole, and holds 8 kB for each of its trials.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        size = save_tokenizer(folder / "encoder")
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
        BertModel(BertConfig(vocab_size=size, **sizes)).save_pretrained(folder / "encoder")
        lines = (f"{'good' if i % 2 else 'bad'} dog {i},{i % 2}" for i in range(20))
        (folder / "moods.csv").write_text("\n".join(["text,label", *lines]))
        search = {
            "model": str(folder / "encoder"),
            "tasks": [{"train": str(folder / "moods.csv")}],
            "space": "attention-only",
            "training": {"steps": 2, "batch_size": 4, "max_length": 8, "precision": "fp32", "device": "cpu"},
        }
        study = {"name": "long", "search": search, "factors": {"noise.ratio": {"values": [0.0, 0.1]}}}
        study["search"] |= {"noise": {"kind": "label", "ratio": 0.0}}
        config = ga.config.StudyConfig.parse({**study, "seeds": list(range(600))}, where="long runs")
        for number in count():
            with redirect_stdout(io.StringIO()):
                Study(config, storage=folder / f"study-{number // RECORD}.journal").run(1)
            yield


LOOPS: dict[str, tuple[Callable[[], Iterator[None]], int]] = {  # how many steps make one turn
    "training steps": (training, 1),
    "attached and detached": (attaching, 10),
    "added to a shelf": (shelves, 10),
    "saved and loaded": (saving, 10),
    "trials of studies": (trials, 20),
}


def run(steps: int) -> int:
    """Run all loops, and print a line for each.

    Args:
        steps: of training; of what is slower a tenth.

    Returns:
        How many loops took ever more memory.
    """
    growing = 0
    for name, (loop, divisor) in LOOPS.items():
        wanted, turns = steps // divisor, loop()
        done = 0
        seen: list[tuple[int, int]] = []  # from the end of the first half on
        for look in range(LOOKS, 2 * LOOKS + 1):
            while done < wanted * look // (2 * LOOKS):
                next(turns)
                done += 1
            seen.append(_memory())
        turns.close()
        # A leak lifts the memory between all looks; an allocator that takes or returns a pool does so once.
        lifts = [after[0] - before[0] for before, after in pairwise(seen)]
        grown, objects = round(median(lifts) * LOOKS), seen[-1][1] - seen[0][1]
        pools = seen[-1][0] - seen[0][0]
        grows = objects > OBJECTS or (wanted >= 2 * SETTLED and (grown > BYTES or pools > POOLS))
        growing += grows
        memory = f"{grown / 2**10:+,.0f} kB steadily, {pools / 2**10:+,.0f} kB in all"
        told = f"{name}: {wanted:,} times, in the second half {memory}, {objects:+,} objects"
        print(told + (": GROWS" if grows else ""), flush=True)
    return growing


def _memory() -> tuple[int, int]:
    """Resident bytes that are in use, and Python objects; 0 bytes where the system does not tell."""
    gc.collect()
    objects, told = len(gc.get_objects()), Path("/proc/self/statm")
    if not told.exists():
        return 0, objects
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's: what the allocator holds free goes back
        trim(0)
    return int(told.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"), objects
