"""What tuning 1 % of the elements costs: memory and step time against full fine-tuning and peft's SHiRA.

Claims under test, Llama-like models in fp32, AdamW, 1 % of the elements of every linear map of the blocks:
peak resident memory above the loaded model is at most 0.35 of full fine-tuning's and no more than SHiRA's; a step takes
at most 0.9 of full fine-tuning's time and no more than SHiRA's.

    python benchmarks/sparse_memory.py run [--sizes 10 50 ...] [--tokens 128] [--checkpoint]
    python benchmarks/sparse_memory.py table

Memory: each side in a fresh process, the high-water mark of its resident set after loading (VmHWM, reset once the
model is loaded) minus the resident set then; applying the mask, three steps and the optimiser's state are all in it.
Time: the sides take turns in one process, on copies of one model; CPU seconds beside wall time, as other work may
share the machine. Every cell is stored as it finishes.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gatedadapters as ga
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Path(__file__).parent / "results" / "sparse_memory"
DENSITY, LENGTH = 0.01, 128
SIDES = ("full", "masked", "shira")
SIZES = {  # name in millions: hidden, intermediate, layers, vocabulary
    "10": (256, 768, 8, 8192),
    "50": (512, 1536, 16, 8192),
    "135": (768, 2304, 16, 16384),
    "300": (1024, 3072, 20, 32768),
    "500": (1280, 3840, 22, 32768),
}


def build(size: str) -> LlamaForCausalLM:
    """A random Llama of that size."""
    hidden, intermediate, layers, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).train()


def linear_names(model: nn.Module) -> list[str]:
    """The linear maps of the blocks."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers." in name]


def prepared(side: str, model: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """A model ready to be trained the side's way, and what is trained."""
    names = linear_names(model)
    if side == "masked":
        generator, chosen = torch.Generator().manual_seed(2), {}
        for name in names:
            size = model.get_submodule(name).weight.numel()
            drawn = torch.randint(0, size, (round(1.005 * DENSITY * size),), generator=generator)
            chosen[f"{name}.weight"] = drawn.unique()[: round(DENSITY * size)]
        mask = ga.Mask.build(model, chosen)
        ga.apply_mask(model, mask)
    elif side == "shira":
        from peft import ShiraConfig, get_peft_model

        shapes = [model.get_submodule(name).weight.shape for name in names]
        rank = round(DENSITY * sum(a * b for a, b in shapes) / sum(a + b for a, b in shapes))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(model, ShiraConfig(r=rank, target_modules=names))
    return model, [p for p in model.parameters() if p.requires_grad]


class Step:
    """One training step on random tokens."""

    def __init__(self, side: str, model: nn.Module, vocabulary: int, tokens: int, checkpoint: bool) -> None:
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model, self.trained = prepared(side, model)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, vocabulary, (max(1, tokens // LENGTH), min(tokens, LENGTH)), generator=generator)

    def __call__(self) -> float:
        """Run it; the loss."""
        self.optimizer.zero_grad()
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def memory(side: str, size: str, tokens: int, checkpoint: bool, steps: int = 3) -> dict[str, Any]:
    """In this process: bytes above the loaded model, at the peak."""
    model = build(size)
    parameters = sum(p.numel() for p in model.parameters())
    loaded = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step = Step(side, model, model.config.vocab_size, tokens, checkpoint)
    losses = [step() for _ in range(steps)]
    return {
        "peak_bytes": _status("VmHWM") - loaded,
        "loaded_bytes": loaded,
        "params": parameters,
        "trained": sum(p.numel() for p in step.trained),
        "losses": losses,
    }


def _status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def times(size: str, tokens: int, rounds: int, checkpoint: bool) -> dict[str, Any]:
    """In this process: the sides in turns; seconds of each round."""
    model = build(size)
    vocabulary = model.config.vocab_size
    steps = {side: Step(side, copy.deepcopy(model), vocabulary, tokens, checkpoint) for side in SIDES}
    wall: dict[str, list[float]] = {side: [] for side in SIDES}
    cpu: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        for side, step in steps.items():
            began, used = time.perf_counter(), time.process_time()
            step()
            if number:
                wall[side].append(time.perf_counter() - began)
                cpu[side].append(time.process_time() - used)
    return {"wall": wall, "cpu": cpu}


@dataclass(frozen=True)
class Cell:
    """One measurement: everything its result depends on."""

    kind: str
    size: str
    tokens: int
    checkpoint: bool
    side: str
    threads: int = 2
    rounds: int = 7

    @property
    def file(self) -> Path:
        """Where its result is stored."""
        checkpoint = "-checkpointed" if self.checkpoint else ""
        return STORE / f"{self.kind}-{self.size}m-{self.tokens}{checkpoint}-{self.side}.json"

    def measure(self) -> dict[str, Any]:
        """In this process."""
        torch.set_num_threads(self.threads)
        if self.kind == "memory":
            return memory(self.side, self.size, self.tokens, self.checkpoint)
        return times(self.size, self.tokens, self.rounds, self.checkpoint)

    def store(self, found: dict[str, Any]) -> None:
        """Whole or not at all."""
        STORE.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps({"cell": asdict(self), **found, "versions": versions()}, indent=1) + "\n")
        os.replace(part, self.file)

    def run(self) -> None:
        """Measure in a fresh process, unless it is stored."""
        if self.file.exists():
            return
        command = [sys.executable, "-W", "ignore", __file__, "one", "--cell", json.dumps(asdict(self))]
        environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"{self.file.name}: {done.stderr[-2000:]}")
        print(self.file.stem, flush=True)


def table() -> str:
    """From the stored cells."""
    stored = [json.loads(file.read_text()) for file in sorted(STORE.glob("*.json"))]
    found = {(c["cell"]["kind"], _place(c), c["cell"]["side"]): c for c in stored}
    rows = []
    for place in sorted({_place(c) for c in stored}):
        peaks = {side: found["memory", place, side] for side in SIDES if ("memory", place, side) in found}
        timed = found.get(("times", place, "all"))
        size, tokens, checkpoint = place
        params = next(iter(peaks.values()))["params"] / 1e6 if peaks else size
        row = [f"{params:.0f}", str(tokens), "yes" if checkpoint else "no"]
        row += [f"{peaks[side]['peak_bytes'] / 1e6:.0f}" if side in peaks else "" for side in SIDES]
        for other in ("full", "shira"):
            both = "masked" in peaks and other in peaks
            row.append(f"{peaks['masked']['peak_bytes'] / peaks[other]['peak_bytes']:.2f}" if both else "")
        for clock in ("wall", "cpu"):
            row += [_ratio(timed[clock], "masked", other) if timed else "" for other in ("full", "shira")]
        rows.append(row)
    header = [
        "M params",
        "tokens",
        "checkpointed",
        "full MB",
        "masked MB",
        "SHiRA MB",
        "memory / full",
        "memory / SHiRA",
        "time / full",
        "time / SHiRA",
        "CPU s / full",
        "CPU s / SHiRA",
    ]
    return format_table(header, rows)


def _place(result: dict[str, Any]) -> tuple[int, int, bool]:
    return int(result["cell"]["size"]), result["cell"]["tokens"], result["cell"]["checkpoint"]


def _ratio(seconds: dict[str, list[float]], a: str, b: str) -> str:
    """Median over rounds of the ratio within a round."""
    return f"{statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True)):.2f}"


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "table", "one"))
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["50"])
    parser.add_argument("--tokens", type=int, default=128, help="per step, in rows of up to 128")
    parser.add_argument("--checkpoint", action="store_true", help="checkpoint activations, on all sides")
    parser.add_argument("--kinds", nargs="+", choices=("memory", "times"), default=["memory", "times"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cell", help="of the command one: a cell as JSON")
    options = parser.parse_args()
    if options.command == "one":
        cell = Cell(**json.loads(options.cell))
        cell.store(cell.measure())
        return
    for size in options.sizes if options.command == "run" else ():
        for kind in options.kinds:
            for side in SIDES if kind == "memory" else ("all",):
                Cell(kind, size, options.tokens, options.checkpoint, side, options.threads, options.rounds).run()
    print(table())


if __name__ == "__main__":
    main()
