"""What a shelf of a hundred adapters costs: loading one, switching, files, and a batch of eight against peft's.

Claims under test, on SmolLM2-135M with LoRA of rank 8 at queries and values (460,800 parameters in 60 paths): one of
100 adapters loads in at most 10 ms; switching takes at most 20 microseconds; the file of weights is within 2 % of 4
bytes a parameter; a forward pass of 8 texts with 8 adapters costs at most 1.1 of peft's, which takes turns with it.

    python -m benchmarks shelf run [--rounds 7]
    python -m benchmarks shelf table

Loading and the forward passes are told in CPU time on one thread, which a busy machine disturbs less than wall time;
switching is the best of many runs of a thousand.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

import gatedadapters as ga
from benchmarks.common.command import carry_out, parser
from benchmarks.common.models import lora_space
from benchmarks.common.store import Result, Store
from benchmarks.common.timing import in_turns, medians, ratio
from gatedadapters.data.bundled import load_smollm2
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Store("shelf")
NAME = "smollm2"  # of the only result
RANK, ADAPTERS, MIXED, TOKENS = 8, 100, 8, 64
LIMITS = {"load ms": 10.0, "switch us": 20.0, "file bytes / 4 a parameter": 1.02, "mixed batch / peft": 1.1}


def folders(model: nn.Module, place: Path) -> list[Path]:
    """Eight saved adapters of random values, each as ours and, beside it, as peft's; the model is left as it was."""
    for index in range(MIXED):
        adapters = ga.attach(model, lora_space(RANK, roles=["q", "v"]))
        with torch.no_grad():
            for parameter in adapters.weight_parameters():
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(index))
        adapters.compact()
        adapters.save(place / str(index))
        ga.export_peft(adapters, place / f"{index}-peft")
        adapters.detach()
    return [place / str(index) for index in range(MIXED)]


def of_peft(model: nn.Module, place: Path) -> Any:
    """The same adapters in peft."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = PeftModel.from_pretrained(model, place / "0-peft", adapter_name="0")
        for index in range(1, MIXED):
            found.load_adapter(place / f"{index}-peft", adapter_name=str(index))
    return found.eval()


def switching(shelf: ga.Shelf, names: Sequence[str]) -> float:
    """Microseconds of a switch: the best of runs of a thousand."""
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for index in range(1000):
            shelf.activate(names[index % len(names)])
        best = min(best, 1000 * (time.perf_counter() - began))
    return best


def measure(rounds: int) -> Result:
    """All four figures."""
    torch.manual_seed(0)
    model = load_smollm2()[0].eval()
    theirs = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as scratch:
        saved = folders(model, Path(scratch))
        params = ga.Structure.load(saved[0]).params
        size = (saved[0] / "adapters.safetensors").stat().st_size
        shelf = ga.Shelf.load(model, {str(index): folder for index, folder in enumerate(saved)})
        loads = []
        for index in range(MIXED, ADAPTERS):
            began = time.process_time()
            shelf.add(str(index), saved[index % MIXED])
            loads.append(1000 * (time.process_time() - began))
        peft = of_peft(theirs, Path(scratch))
    batch = {"input_ids": torch.randint(5, 40_000, (MIXED, TOKENS)), "adapter_names": [str(i) for i in range(MIXED)]}

    def forward(side: Any) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = side(**batch).logits
        return found

    torch.testing.assert_close(forward(model), forward(peft), rtol=1e-3, atol=1e-3)
    seconds = in_turns({"ours": lambda: forward(model), "peft": lambda: forward(peft)}, rounds, warm_up=1)["cpu"]
    return {
        "adapters": ADAPTERS,
        "parameters of one": params,
        "bytes in memory": sum(shelf.bytes.values()),
        "cpu_seconds": medians(seconds),
        "figures": {
            "load ms": statistics.median(loads[-20:]),
            "switch us": switching(shelf, list(shelf.bytes)),
            "file bytes / 4 a parameter": size / (4 * params),
            "mixed batch / peft": ratio(seconds, "ours", "peft"),
        },
        "rounds": rounds,
        "versions": versions(),
    }


def table() -> str:
    """The four figures, their limits, and whether each claim holds; nothing where nothing is stored."""
    result = STORE.read(NAME)
    if result is None:
        return ""
    rows = [
        [
            name,
            f"{result['figures'][name]:.4g}",
            f"{limit:g}",
            "holds" if result["figures"][name] <= limit else "DOES NOT",
        ]
        for name, limit in LIMITS.items()
    ]
    each = result["bytes in memory"] / result["adapters"]
    note = f"{result['adapters']} adapters of {result['parameters of one']:,} parameters: {each / 2**20:.2f} MiB each"
    return "\n".join([format_table(["figure", "measured", "at most", "claim"], rows), note])


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("shelf", __doc__, threads=1)
    made.add_argument("--rounds", type=int, default=7)
    options = made.parse_args(arguments)
    carry_out(options, run=lambda: STORE.write(NAME, measure(options.rounds)), table=table, pack=STORE.pack)
