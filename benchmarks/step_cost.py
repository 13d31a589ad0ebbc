"""What gating costs: one training step against peft's LoRA and against the frozen backbone.

Claims under test, each at LoRA rank 8 on every linear map of the blocks, rank gates, AdamW, batch 8 x 128:
a gated step costs at most 0.75 of peft's; it saves no more activation bytes; with 80 % of the paths closed it costs at
most 0.9 of the same model all open; the gate bank at 10,000 gates costs at most 1 % of a step; attaching 10,000
candidates takes at most 2 s.

    python benchmarks/step_cost.py [--rounds 11] [--threads 1] [--precisions fp32 bf16] [--parts steps bank]

The sides take turns within each round, in an order drawn anew, so that a busy machine slows all of them; medians of CPU
seconds and of the ratios within a round are reported, those of wall seconds are stored beside them.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaModel

import gatedadapters as ga
from gatedadapters.data.bundled import load_encoder
from gatedadapters.gates import GateBank, Group
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Path(__file__).parent / "results" / "step_cost.json"
RANK, BATCH, LENGTH = 8, 8, 128
CLOCKS = ("cpu", "wall")


def backbones() -> dict[str, Callable[[], nn.Module]]:
    """MiniLM-L6 as released, and a 12-layer Llama-like model of about 50 M parameters."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8192,
    )
    return {"MiniLM-L6": lambda: load_encoder("minilm-l6")[0], "Llama-like, 12 layers": lambda: LlamaModel(config)}


def sides(model: nn.Module, batch: dict[str, torch.Tensor], bf16: bool) -> dict[str, Step]:
    """One training step of each side, on copies of one model."""
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_block_maps(model)))
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


def _block_maps(model: nn.Module) -> list[str]:
    return [linear.name for _, _, linear in ga.discover(model).maps()]


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


def gate_bank_cost(gates: int = 10_000) -> tuple[float, float]:
    """CPU seconds (of a step of the bank alone with that many rank gates, to attach that many candidates)."""
    bank = GateBank(
        [Group(f"p{i}", "b", f"p{i}", RANK, 768, 1536) for i in range(gates // RANK)], ga.GateConfig(), tasks=1, seed=0
    )
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
    return statistics.median(times), min(seconds)


def measure(rounds: int, precisions: list[str]) -> list[dict[str, Any]]:
    """Interleaved timings of every backbone and precision."""
    results = []
    for name, build in backbones().items():
        for precision in precisions:
            bf16 = precision == "bf16"
            torch.manual_seed(0)
            model = build()
            vocabulary = model.config.vocab_size
            ids = torch.randint(5, vocabulary - 1, (BATCH, LENGTH))
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            steps = sides(model, batch, bf16)
            times: dict[str, list[tuple[float, float]]] = {side: [] for side in steps}
            for _ in range(rounds + 3):
                for side in random.sample(list(steps), len(steps)):
                    began, busy = time.perf_counter(), time.process_time()
                    steps[side]()
                    times[side].append((time.process_time() - busy, time.perf_counter() - began))
            clocks = {
                clock: {side: [t[i] for t in v[3:]] for side, v in times.items()} for i, clock in enumerate(CLOCKS)
            }
            medians = {
                clock: {side: statistics.median(values) for side, values in found.items()}
                for clock, found in clocks.items()
            }
            ratio, wall_ratio = (
                {
                    "gated / peft": _ratio(found, "gated", "peft LoRA"),
                    "gated / frozen": _ratio(found, "gated", "frozen backbone"),
                    "peft / frozen": _ratio(found, "peft LoRA", "frozen backbone"),
                    "closed / open": _ratio(found, "gated, 80 % closed", "gated"),
                }
                for found in clocks.values()
            )
            saved = {side: saved_bytes(steps[side]) for side in ("peft LoRA", "gated")}
            results.append(
                {
                    "model": name,
                    "precision": "bf16 autocast" if bf16 else "fp32",
                    "seconds": medians["cpu"],
                    "ratio": ratio,
                    "wall_seconds": medians["wall"],
                    "wall_ratio": wall_ratio,
                    "saved_bytes": saved,
                }
            )
            print(
                f"{name}, {results[-1]['precision']}: " + ", ".join(f"{k} {v:.2f}" for k, v in ratio.items()),
                flush=True,
            )
    return results


def _ratio(times: dict[str, list[float]], a: str, b: str) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))


def main() -> None:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32"], help="bf16 is slow on some processors"
    )
    parser.add_argument(
        "--parts", nargs="*", choices=("steps", "bank"), default=["steps", "bank"], help="none: print what is stored"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    report = json.loads(STORE.read_text()) if STORE.exists() else {}
    if "steps" in options.parts:
        results = measure(options.rounds, options.precisions)
        report |= {"versions": versions(), "threads": options.threads, "rounds": options.rounds, "results": results}
    if "bank" in options.parts:
        report["bank_10k_seconds"], report["attach_10k_seconds"] = gate_bank_cost()
    STORE.parent.mkdir(exist_ok=True)
    STORE.write_text(json.dumps(report, indent=1) + "\n")
    results, bank, attach = (report[key] for key in ("results", "bank_10k_seconds", "attach_10k_seconds"))
    slowest = min(r["seconds"]["gated"] for r in results)
    header = [
        "model",
        "precision",
        "gated CPU s",
        "peft CPU s",
        "gated / peft",
        "gated / frozen",
        "peft / frozen",
        "80 % closed / open",
        "saved MB gated",
        "saved MB peft",
    ]
    rows = [
        [
            r["model"],
            r["precision"],
            f"{r['seconds']['gated']:.3f}",
            f"{r['seconds']['peft LoRA']:.3f}",
            *(f"{r['ratio'][k]:.2f}" for k in ("gated / peft", "gated / frozen", "peft / frozen", "closed / open")),
            *(f"{r['saved_bytes'][k] / 1e6:.1f}" for k in ("gated", "peft LoRA")),
        ]
        for r in results
    ]
    print(format_table(header, rows))
    print(f"gate bank, 10,000 gates: {1000 * bank:.2f} ms CPU, {bank / slowest:.1%} of the fastest gated step above")
    print(f"attaching 10,000 candidates: {attach:.2f} s CPU")


if __name__ == "__main__":
    main()
