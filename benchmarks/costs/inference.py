"""What compact adapters cost in inference: one forward pass against peft's LoRA and against the backbone.

Claims under test, each at LoRA rank 8 on every linear map of the blocks, batch 8 x 128, no gradients: a compact
adapter that is not merged costs at most 1.0 of peft's LoRA of the same size; a merged one costs what the backbone does,
within 5 % (two copies of one backbone measured this way gave 0.97 to 1.05).

    python -m benchmarks inference run [--rounds 9]
    python -m benchmarks inference table

CPU seconds on one thread, which a busy machine disturbs less than wall time; the sides take turns within each round, in
an order drawn anew, and all are copies, for weights mapped from a file are not read alike. Ratios are medians over
rounds of the ratio within a round. What is stored is not measured again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

import gatedadapters as ga
from benchmarks.common import peft_rivals
from benchmarks.common.command import carry_out, parser
from benchmarks.common.models import BACKBONES, lora_space, random_batch
from benchmarks.common.store import Result, Store
from benchmarks.common.timing import PRECISIONS, in_turns, medians, ratio
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Store("inference")
RANK, WARM_UP = 8, 1
RATIOS = {
    "unmerged / peft": ("unmerged", "peft LoRA"),
    "merged / backbone": ("merged", "backbone"),
    "unmerged / backbone": ("unmerged", "backbone"),
    "peft / backbone": ("peft LoRA", "backbone"),
}


def sides(model: nn.Module) -> dict[str, nn.Module]:
    """The same model bare, with peft's LoRA, and with compact adapters of the same size, unmerged and merged."""
    peft = peft_rivals.lora(copy.deepcopy(model), RANK)
    unmerged = copy.deepcopy(model)
    adapters = ga.attach(unmerged, lora_space(RANK))
    adapters.compact()
    with torch.no_grad():
        for parameter in adapters.weight_parameters():
            parameter.normal_(0, 0.01)
    trained = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    if adapters.structure is None or adapters.structure.params != trained:
        raise AssertionError(f"peft trains {trained:,} parameters, the compact adapter has another number")
    merged = copy.deepcopy(unmerged)
    ga.get_adapters(merged).merge()
    return {
        "backbone": copy.deepcopy(model).eval(),
        "peft LoRA": peft.eval(),
        "unmerged": unmerged.eval(),
        "merged": merged.eval(),
    }


def measure(name: str, precision: str, rounds: int) -> Result:
    """Time a forward pass of the sides on one backbone in one precision."""
    torch.manual_seed(0)
    model = BACKBONES[name]()
    batch = random_batch(model)

    def forward(side: nn.Module) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                side(**batch)

        return call

    calls = {label: forward(side) for label, side in sides(model).items()}
    seconds = in_turns(calls, rounds, warm_up=WARM_UP)["cpu"]
    return {
        "model": name,
        "precision": PRECISIONS[precision],
        "rounds": rounds,
        "cpu_seconds": medians(seconds),
        "ratio": {label: ratio(seconds, *pair) for label, pair in RATIOS.items()},
        "versions": versions(),
    }


def table() -> str:
    """One row per stored backbone and precision, and whether each claim holds."""
    stored = (STORE.read(f"{name}-{precision}") for name in BACKBONES for precision in PRECISIONS)
    results = [result for result in stored if result is not None]
    rows = [
        [
            result["model"],
            result["precision"],
            f"{1000 * result['cpu_seconds']['unmerged']:.0f}",
            *(f"{result['ratio'][label]:.2f}" for label in RATIOS),
        ]
        for result in results
    ]
    lines = [format_table(["model", "precision", "unmerged CPU ms", *RATIOS], rows)]
    if results:
        worst = max(result["ratio"]["unmerged / peft"] for result in results)
        merged = max(abs(result["ratio"]["merged / backbone"] - 1) for result in results)
        lines += [
            f"unmerged at most 1.0 of peft's: {'holds' if worst <= 1.0 else f'does NOT hold, {worst:.2f}'}",
            f"merged = backbone: {'holds' if merged <= 0.05 else 'does NOT hold'}, within {merged:.1%}",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("inference", __doc__, threads=1)
    made.add_argument("--rounds", type=int, default=9)
    options = made.parse_args(arguments)

    def run() -> None:
        for name in BACKBONES:
            for precision in PRECISIONS:
                STORE.computed(f"{name}-{precision}", partial(measure, name, precision, options.rounds))

    carry_out(options, run=run, table=table, pack=STORE.pack)
