"""What gating costs: one training step against peft's LoRA and against the frozen backbone.

Claims under test, each at LoRA rank 8 on every linear map of the blocks, rank gates, AdamW, batch 8 x 128:
a gated step costs at most 0.75 of peft's; it saves no more activation bytes; with 80 % of the paths closed it costs at
most 0.9 of the same model all open; the gate bank at 10,000 gates costs at most 1 % of a step; attaching 10,000
candidates takes at most 2 s.

    python -m benchmarks step run [--rounds 11] [--threads 1] [--precisions fp32 bf16] [--parts steps bank]
    python -m benchmarks step table

The sides take turns within each round, in an order drawn anew, so that a busy machine slows all of them; medians of CPU
seconds and of the ratios within a round are reported, those of wall seconds are stored beside them.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

import gatedadapters as ga
from benchmarks.common import peft_rivals
from benchmarks.common.command import carry_out, parser
from benchmarks.common.models import BACKBONES, random_batch
from benchmarks.common.store import Result, Store
from benchmarks.common.timing import PRECISIONS, in_turns, medians, ratio
from gatedadapters.gates import GateBank, GateGroup
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Store("step")
BANK = "bank"  # the result of the gate bank alone; the others are named after backbone and precision
RANK, WARM_UP = 8, 3
LABELS = {"minilm-l6": "MiniLM-L6", "llama-12": "Llama-like, 12 layers"}
RATIOS = {
    "gated / peft": ("gated", "peft LoRA"),
    "gated / frozen": ("gated", "frozen backbone"),
    "peft / frozen": ("peft LoRA", "frozen backbone"),
    "closed / open": ("gated, 80 % closed", "gated"),
}


def sides(model: nn.Module, batch: dict[str, torch.Tensor], bf16: bool) -> dict[str, Step]:
    """One training step of each side, on copies of one model."""
    peft = peft_rivals.lora(copy.deepcopy(model), RANK)
    gated, closed, floor = (copy.deepcopy(model) for _ in range(3))
    adapters = ga.attach(gated, "lora-all-linear", batch, penalty=ga.L0(weight=1.0))
    mostly_closed = ga.attach(closed, "lora-all-linear", batch, penalty=ga.L0(weight=1.0))
    keys = list(mostly_closed.bank.slices)
    with torch.no_grad():
        for i, key in enumerate(keys):
            if i % 5:
                mostly_closed.bank.log_alpha[:, mostly_closed.bank.slices[key]] = mostly_closed.bank.config.bounds[0]
    mostly_closed.bank.config = mostly_closed.bank.config.model_copy(update={"stochastic": False})
    for parameter in floor.parameters():
        parameter.requires_grad_(False)
    seed_parameter = nn.Parameter(torch.zeros(()))
    first = next(m for m in floor.modules() if isinstance(m, nn.Linear))
    first.register_forward_hook(lambda module, args, output: output + seed_parameter.to(output.dtype))
    return {
        "peft LoRA": Step(peft, batch, [p for p in peft.parameters() if p.requires_grad], bf16),
        "gated": Step(gated, batch, adapters.weight_parameters(), bf16, adapters),
        "gated, 80 % closed": Step(closed, batch, mostly_closed.weight_parameters(), bf16, mostly_closed),
        "frozen backbone": Step(floor, batch, [seed_parameter], bf16),
    }


class Step:
    """One training step: forward, loss, penalty where there are gates, backward, AdamW."""

    def __init__(
        self,
        model: nn.Module,
        batch: dict[str, torch.Tensor],
        weights: list[nn.Parameter],
        bf16: bool,
        adapters: ga.Adapters | None = None,
    ) -> None:
        groups: list[dict[str, Any]] = [{"params": weights, "lr": 1e-6}]
        if adapters is not None:
            groups.append({"params": adapters.gate_parameters(), "lr": 1e-9, "weight_decay": 0.0})
        self.model, self.batch, self.bf16, self.adapters = model.train(), batch, bf16, adapters
        self.optimizer = torch.optim.AdamW(groups)

    def __call__(self) -> None:
        """Run it."""
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model(**self.batch).last_hidden_state.float().pow(2).mean()
        if self.adapters is not None:
            loss = loss + self.adapters.penalty()
        loss.backward()
        self.optimizer.step()


def saved_bytes(step: Step) -> int:
    """Bytes that autograd holds for the backward pass, each storage once, parameters and buffers left out."""
    held: dict[int, int] = {}
    parameters = {t.untyped_storage().data_ptr() for t in (*step.model.parameters(), *step.model.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(held.values())


def measure(name: str, precision: str, rounds: int) -> Result:
    """Time the sides on one backbone in one precision."""
    torch.manual_seed(0)
    model = BACKBONES[name]()
    steps = sides(model, random_batch(model), precision == "bf16")
    times = in_turns(steps, rounds, warm_up=WARM_UP)
    ratios = {
        clock: {label: ratio(seconds, *pair) for label, pair in RATIOS.items()} for clock, seconds in times.items()
    }
    return {
        "model": LABELS[name],
        "precision": PRECISIONS[precision],
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "seconds": medians(times["cpu"]),
        "ratio": ratios["cpu"],
        "wall_seconds": medians(times["wall"]),
        "wall_ratio": ratios["wall"],
        "saved_bytes": {side: saved_bytes(steps[side]) for side in ("peft LoRA", "gated")},
        "versions": versions(),
    }


def gate_bank_cost(gates: int = 10_000) -> Result:
    """CPU seconds of a step of the bank alone with that many rank gates, and to attach that many candidates."""
    groups = [GateGroup(f"p{i}", "b", f"p{i}", RANK, 768, 1536) for i in range(gates // RANK)]
    bank = GateBank(groups, ga.GateConfig(), tasks=1, seed=0)
    times = []
    for _ in range(15):
        began = time.process_time()
        bank.next_step()
        bank.draw()
        bank.refresh()
        bank.expected_cost().backward()
        bank.log_alpha.grad = None
        times.append(time.process_time() - began)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=80, num_attention_heads=2, vocab_size=64
    )
    model = LlamaModel(config)
    space = ga.SearchSpace.parse({"paths": [{"kind": "lora", "rank": 1}] * 18}, where="here")
    seconds = []
    for _ in range(3):
        began = time.process_time()
        adapters = ga.attach(model, space)
        seconds.append(time.process_time() - began)
        if len(adapters.paths) < gates:
            raise AssertionError(f"{len(adapters.paths)} candidates attached, not {gates}")
        ga.detach(model)
    return {
        "bank_10k_seconds": statistics.median(times),
        "attach_10k_seconds": min(seconds),
        "versions": versions(),
    }


def table() -> str:
    """Every stored backbone and precision, and the gate bank beside the fastest step."""
    stored = (STORE.read(f"{name}-{precision}") for name in BACKBONES for precision in PRECISIONS)
    results = [result for result in stored if result is not None]
    header = [
        *("model", "precision", "gated CPU s", "peft CPU s", "gated / peft", "gated / frozen", "peft / frozen"),
        *("80 % closed / open", "saved MB gated", "saved MB peft"),
    ]
    rows = [
        [
            result["model"],
            result["precision"],
            f"{result['seconds']['gated']:.3f}",
            f"{result['seconds']['peft LoRA']:.3f}",
            *(f"{result['ratio'][label]:.2f}" for label in RATIOS),
            *(f"{result['saved_bytes'][side] / 1e6:.1f}" for side in ("gated", "peft LoRA")),
        ]
        for result in results
    ]
    lines = [format_table(header, rows)]
    bank = STORE.read(BANK)
    if bank is not None and results:
        seconds, slowest = bank["bank_10k_seconds"], min(result["seconds"]["gated"] for result in results)
        share = f"{seconds / slowest:.1%} of the fastest gated step above"
        lines.append(f"gate bank, 10,000 gates: {1000 * seconds:.2f} ms CPU, {share}")
        lines.append(f"attaching 10,000 candidates: {bank['attach_10k_seconds']:.2f} s CPU")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("step", __doc__, threads=1)
    made.add_argument("--rounds", type=int, default=11)
    made.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=["fp32"], help="bf16 is slow on some processors"
    )
    made.add_argument("--parts", nargs="*", choices=("steps", "bank"), default=["steps", "bank"])
    options = made.parse_args(arguments)

    def run() -> None:
        if "steps" in options.parts:
            for name in BACKBONES:
                for precision in options.precisions:
                    result = measure(name, precision, options.rounds)
                    STORE.write(f"{name}-{precision}", result)
                    ratios = ", ".join(f"{label} {value:.2f}" for label, value in result["ratio"].items())
                    print(f"{result['model']}, {result['precision']}: {ratios}", flush=True)
        if "bank" in options.parts:
            STORE.write(BANK, gate_bank_cost())

    carry_out(options, run=run, table=table, pack=STORE.pack)
