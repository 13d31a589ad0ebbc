"""What compact adapters cost in inference: one forward pass against peft's LoRA and against the backbone.

Claims under test, each at LoRA rank 8 on every linear map of the blocks, batch 8 x 128, no gradients: a compact
adapter that is not merged costs at most 1.0 of peft's LoRA of the same size; a merged one costs what the backbone does,
within 5 % (two copies of one backbone measured this way gave 0.97 to 1.05).

    python benchmarks/inference_cost.py [--rounds 9]

CPU seconds on one thread, which a busy machine disturbs less than wall time; the sides take turns within each round, in
an order drawn anew, and all are copies, for weights mapped from a file are not read alike. Ratios are medians over
rounds of the ratio within a round. Each cell is stored as it finishes, and a stored one is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaModel

import gatedadapters as ga
from gatedadapters.data.bundled import load_encoder
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Path(__file__).parent / "results" / "inference_cost"
RANK, BATCH, LENGTH, WARM_UP = 8, 8, 128, 1
RATIOS = {
    "unmerged / peft": ("unmerged", "peft LoRA"),
    "merged / backbone": ("merged", "backbone"),
    "unmerged / backbone": ("unmerged", "backbone"),
    "peft / backbone": ("peft LoRA", "backbone"),
}


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
    return {"minilm-l6": lambda: load_encoder("minilm-l6")[0], "llama-12": lambda: LlamaModel(config)}


def sides(model: nn.Module) -> dict[str, nn.Module]:
    """The same model bare, with peft's LoRA, and with compact adapters of the same size, unmerged and merged."""
    targets = [linear.name for _, _, linear in ga.discover(model).maps()]
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))
    unmerged = copy.deepcopy(model)
    adapters = ga.attach(unmerged, ga.SearchSpace.parse({"paths": [{"kind": "lora", "rank": RANK}]}, where="here"))
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


@torch.inference_mode()
def seconds(models: Mapping[str, nn.Module], batch: Mapping[str, Any], *, bf16: bool, rounds: int) -> dict[str, Any]:
    """CPU seconds of every round by side."""
    times: dict[str, list[float]] = {side: [] for side in models}
    generator = random.Random(0)
    for _ in range(rounds + WARM_UP):
        for side in generator.sample(list(models), len(models)):
            began = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                models[side](**batch)
            times[side].append(time.process_time() - began)
    return {side: values[WARM_UP:] for side, values in times.items()}


def cell(name: str, bf16: bool, rounds: int) -> dict[str, Any]:
    """One backbone in one precision, from the store or measured now."""
    precision = "bf16 autocast" if bf16 else "fp32"
    file = STORE / f"{name}_{precision.replace(' ', '-')}.json"
    if file.exists():
        stored: dict[str, Any] = json.loads(file.read_text())
        return stored
    torch.manual_seed(0)
    model = backbones()[name]()
    ids = torch.randint(5, model.config.vocab_size - 1, (BATCH, LENGTH))
    times = seconds(sides(model), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, bf16=bf16, rounds=rounds)
    ratio = {
        label: statistics.median(x / y for x, y in zip(times[a], times[b], strict=True))
        for label, (a, b) in RATIOS.items()
    }
    result = {
        "model": name,
        "precision": precision,
        "rounds": rounds,
        "cpu_seconds": {side: statistics.median(values) for side, values in times.items()},
        "ratio": ratio,
        "versions": versions(),
    }
    STORE.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(".part")
    scratch.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(scratch, file)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """One row per backbone and precision, and whether each claim holds."""
    rows = [
        [
            r["model"],
            r["precision"],
            f"{1000 * r['cpu_seconds']['unmerged']:.0f}",
            *(f"{r['ratio'][k]:.2f}" for k in RATIOS),
        ]
        for r in results
    ]
    worst = max(r["ratio"]["unmerged / peft"] for r in results)
    merged = max(abs(r["ratio"]["merged / backbone"] - 1) for r in results)
    return "\n".join(
        [
            format_table(["model", "precision", "unmerged CPU ms", *RATIOS], rows),
            f"unmerged at most 1.0 of peft's: {'holds' if worst <= 1.0 else f'does NOT hold, {worst:.2f}'}",
            f"merged = backbone: {'holds' if merged <= 0.05 else 'does NOT hold'}, within {merged:.1%}",
        ]
    )


def main() -> None:
    """Measure what is not stored yet, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(table([cell(name, bf16, options.rounds) for name in backbones() for bf16 in (False, True)]))


if __name__ == "__main__":
    main()
