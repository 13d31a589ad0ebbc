"""What weakening knowledge costs: one training step with its hooks against the same step without.

Claim under test: knowledge masking and dropping add at most 3 % to a step. Dropping skips what it drops, so that a step
of the published recipe (p_c = 0.1) should not be slower at all.

    python benchmarks/weakening_cost.py [--rounds 11] [--threads 1] [--precisions fp32 bf16]

LoRA rank 8 at every linear map of MiniLM-L6, batch 8 x 128, AdamW. The sides take turns within each round, so that a
busy machine slows all of them; medians of the ratio within a round are reported, of CPU seconds and of wall seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gatedadapters as ga
from gatedadapters.data.bundled import load_encoder
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Path(__file__).parent / "results" / "weakening_cost.json"
RANK, BATCH, LENGTH = 8, 8, 128
SIDES: dict[str, dict[str, float] | None] = {
    "without": None,
    "hooks that never hit": {"drop": 1e-9},
    "p_c 0.1": {"drop": 0.1},
    "p_i 0.1": {"drop": 0.0, "mask": 0.1},
    "p_c 0.1, p_i 0.1": {"drop": 0.1, "mask": 0.1},
}


class Step:
    """One training step: forward, loss, backward, AdamW."""

    def __init__(self, model: nn.Module, batch: dict[str, torch.Tensor], options: dict[str, float] | None, bf16: bool):
        self.model, self.batch, self.bf16 = copy.deepcopy(model).train(), batch, bf16
        if options is not None:
            ga.weaken_knowledge(self.model, **options)
        weights = ga.get_adapters(self.model).weight_parameters()
        self.optimizer = torch.optim.AdamW(weights, lr=1e-6)

    def __call__(self) -> tuple[float, float]:
        """CPU and wall seconds it took."""
        began, busy = time.perf_counter(), time.process_time()
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model(**self.batch).last_hidden_state.float().pow(2).mean()
        loss.backward()
        self.optimizer.step()
        return time.process_time() - busy, time.perf_counter() - began


def measure(rounds: int, bf16: bool) -> dict[str, Any]:
    """Interleaved timings."""
    torch.manual_seed(0)
    model, _ = load_encoder("minilm-l6")
    ids = torch.randint(1000, 20000, (BATCH, LENGTH))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    space = ga.SearchSpace.parse({"paths": [{"kind": "lora", "rank": RANK}]}, where="benchmark")
    ga.attach(model, space, batch).compact()
    steps = {side: Step(model, batch, options, bf16) for side, options in SIDES.items()}
    times: dict[str, list[tuple[float, float]]] = {side: [] for side in steps}
    for number in range(rounds + 2):
        for side, step in steps.items():
            taken = step()
            if number >= 2:
                times[side].append(taken)
    found: dict[str, Any] = {"precision": "bf16 autocast" if bf16 else "fp32"}
    for number, unit in enumerate(("cpu", "wall")):
        found[f"{unit}_seconds"] = {
            side: statistics.median(v[number] for v in values) for side, values in times.items()
        }
        found[f"{unit}_ratio"] = {
            side: statistics.median(a[number] / b[number] for a, b in zip(values, times["without"], strict=True))
            for side, values in times.items()
        }
    return found


def main() -> None:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32"], help="bf16 is slow on some processors"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [measure(options.rounds, precision == "bf16") for precision in options.precisions]
    STORE.parent.mkdir(exist_ok=True)
    report = {"versions": versions(), "threads": options.threads, "rounds": options.rounds, "results": results}
    STORE.write_text(json.dumps(report, indent=1) + "\n")
    rows = [
        [
            f"{r['precision']}, {unit}",
            f"{r[f'{unit}_seconds']['without']:.3f}",
            *(f"{r[f'{unit}_ratio'][side]:.3f}" for side in list(SIDES)[1:]),
        ]
        for r in results
        for unit in ("cpu", "wall")
    ]
    print(format_table(["step time / without", "without, s", *list(SIDES)[1:]], rows))
    for side in list(SIDES)[1:]:
        worst = max(r["cpu_ratio"][side] for r in results)
        print(f"{side}: {worst - 1:+.1%} CPU time, {'within' if worst <= 1.03 else 'NOT within'} the claimed 3 %")


if __name__ == "__main__":
    main()
