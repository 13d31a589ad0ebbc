"""What weakening knowledge costs: one training step with its hooks against the same step without.

Claim under test: knowledge masking and dropping add at most 3 % to a step. Dropping skips what it drops, so that a step
of the published recipe (p_c = 0.1) should not be slower at all.

    python -m benchmarks weakening run [--rounds 11] [--threads 1] [--precisions fp32 bf16]
    python -m benchmarks weakening table

LoRA rank 8 at every linear map of MiniLM-L6, batch 8 x 128, AdamW. The sides take turns within each round, so that a
busy machine slows all of them; medians of the ratio within a round are reported, of CPU seconds and of wall seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

import gatedadapters as ga
from benchmarks.common.command import carry_out, parser
from benchmarks.common.models import BACKBONES, lora_space, random_batch
from benchmarks.common.store import Result, Store
from benchmarks.common.timing import CLOCKS, PRECISIONS, in_turns, medians, ratio
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Store("weakening")
RANK, WARM_UP = 8, 2
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
        self.optimizer = torch.optim.AdamW(ga.get_adapters(self.model).weight_parameters(), lr=1e-6)

    def __call__(self) -> None:
        """Run it."""
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model(**self.batch).last_hidden_state.float().pow(2).mean()
        loss.backward()
        self.optimizer.step()


def measure(precision: str, rounds: int) -> Result:
    """Time the sides in one precision."""
    torch.manual_seed(0)
    model = BACKBONES["minilm-l6"]()
    batch = random_batch(model)
    ga.attach(model, lora_space(RANK), batch).compact()
    steps = {side: Step(model, batch, options, precision == "bf16") for side, options in SIDES.items()}
    times = in_turns(steps, rounds, warm_up=WARM_UP)
    found: Result = {"precision": PRECISIONS[precision], "threads": torch.get_num_threads(), "rounds": rounds}
    for clock in CLOCKS:
        found[f"{clock}_seconds"] = medians(times[clock])
        found[f"{clock}_ratio"] = {side: ratio(times[clock], side, "without") for side in SIDES}
    return {**found, "versions": versions()}


def table() -> str:
    """Every stored precision, and whether the claim holds."""
    results = [result for result in map(STORE.read, PRECISIONS) if result is not None]
    _, *sides = SIDES
    rows = [
        [
            f"{result['precision']}, {clock}",
            f"{result[f'{clock}_seconds']['without']:.3f}",
            *(f"{result[f'{clock}_ratio'][side]:.3f}" for side in sides),
        ]
        for result in results
        for clock in CLOCKS
    ]
    lines = [format_table(["step time / without", "without, s", *sides], rows)]
    for side in sides if results else ():
        worst = max(result["cpu_ratio"][side] for result in results)
        verdict = "within" if worst <= 1.03 else "NOT within"
        lines.append(f"{side}: {worst - 1:+.1%} CPU time, {verdict} the claimed 3 %")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("weakening", __doc__, threads=1)
    made.add_argument("--rounds", type=int, default=11)
    made.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["fp32"], help="bf16 is slow on some processors"
    )
    options = made.parse_args(arguments)

    def run() -> None:
        for precision in options.precisions:
            STORE.write(precision, measure(precision, options.rounds))

    carry_out(options, run=run, table=table, pack=STORE.pack)
