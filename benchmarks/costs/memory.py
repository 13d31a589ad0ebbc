"""What tuning 1 % of the elements costs: memory and step time against full fine-tuning and peft's SHiRA.

Claims under test, Llama-like models in fp32, AdamW, 1 % of the elements of every linear map of the blocks:
peak resident memory above the loaded model is at most 0.35 of full fine-tuning's and no more than SHiRA's; a step takes
at most 0.9 of full fine-tuning's time and no more than SHiRA's.

    python -m benchmarks memory run [--sizes 10 50 ...] [--tokens 128] [--checkpoint]
    python -m benchmarks memory table

Memory: each side in a fresh process, the high-water mark of its resident set after loading (VmHWM, reset once the
model is loaded) minus the resident set then; applying the mask, three steps and the optimiser's state are all in it.
Time: the sides take turns in one process, on copies of one model; CPU seconds beside wall time, as other work may
share the machine. What is stored is not measured again.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gatedadapters as ga
from benchmarks.common import peft_rivals
from benchmarks.common.command import carry_out, parser
from benchmarks.common.memory import peak_above, reset_peak
from benchmarks.common.models import block_maps
from benchmarks.common.store import BENCHMARKS, Result, Store
from benchmarks.common.timing import CLOCKS, in_turns, ratio
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Store("memory")
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


def prepared(side: str, model: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """A model ready to be trained the side's way, and what is trained."""
    maps = block_maps(model)
    if side == "masked":
        generator, chosen = torch.Generator().manual_seed(2), {}
        for name in maps:
            size = model.get_submodule(name).weight.numel()
            drawn = torch.randint(0, size, (round(1.005 * DENSITY * size),), generator=generator)
            chosen[f"{name}.weight"] = drawn.unique()[: round(DENSITY * size)]
        ga.apply_mask(model, ga.Mask.build(model, chosen))
    elif side == "shira":
        model = peft_rivals.shira(model, peft_rivals.rank_of_share(model, maps, DENSITY))
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


def memory(side: str, size: str, tokens: int, checkpoint: bool, steps: int = 3) -> Result:
    """In this process: bytes above the loaded model, at the peak."""
    model = build(size)
    parameters = sum(p.numel() for p in model.parameters())
    loaded = reset_peak()
    step = Step(side, model, model.config.vocab_size, tokens, checkpoint)
    losses = [step() for _ in range(steps)]
    return {
        "peak_bytes": peak_above(loaded),
        "loaded_bytes": loaded,
        "params": parameters,
        "trained": sum(p.numel() for p in step.trained),
        "losses": losses,
    }


def times(size: str, tokens: int, rounds: int, checkpoint: bool) -> Result:
    """In this process: the sides in turns; seconds of each round."""
    model = build(size)
    vocabulary = model.config.vocab_size
    steps = {side: Step(side, copy.deepcopy(model), vocabulary, tokens, checkpoint) for side in SIDES}
    return dict(in_turns(steps, rounds, warm_up=1))


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
    def name(self) -> str:
        """Its name among the results."""
        checkpoint = "-checkpointed" if self.checkpoint else ""
        return f"{self.kind}-{self.size}m-{self.tokens}{checkpoint}-{self.side}"

    def measure(self) -> None:
        """Measure in this process, and store."""
        torch.set_num_threads(self.threads)
        if self.kind == "memory":
            found = memory(self.side, self.size, self.tokens, self.checkpoint)
        else:
            found = times(self.size, self.tokens, self.rounds, self.checkpoint)
        STORE.write(self.name, {"cell": asdict(self), **found, "versions": versions()})

    def run(self) -> None:
        """Measure in a fresh process, unless it is stored.

        Raises:
            RuntimeError: the process failed.
        """
        if STORE.read(self.name) is not None:
            return
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "memory", "one", "--cell"]
        done = subprocess.run(
            [*command, json.dumps(asdict(self))],
            capture_output=True,
            text=True,
            env=os.environ | {"MALLOC_ARENA_MAX": "1"},
            cwd=BENCHMARKS.parent,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{self.name}: {done.stderr[-2000:]}")
        print(self.name, flush=True)


def table() -> str:
    """Every stored size, number of tokens and way of checkpointing."""
    stored = STORE.results().values()
    found = {(result["cell"]["kind"], _place(result), result["cell"]["side"]): result for result in stored}
    rows = []
    for place in sorted({_place(result) for result in stored}):
        peaks = {side: found["memory", place, side] for side in SIDES if ("memory", place, side) in found}
        timed = found.get(("times", place, "all"))
        size, tokens, checkpoint = place
        params = next(iter(peaks.values()))["params"] / 1e6 if peaks else size
        row = [f"{params:.0f}", str(tokens), "yes" if checkpoint else "no"]
        row += [f"{peaks[side]['peak_bytes'] / 1e6:.0f}" if side in peaks else "" for side in SIDES]
        for other in ("full", "shira"):
            both = "masked" in peaks and other in peaks
            row.append(f"{peaks['masked']['peak_bytes'] / peaks[other]['peak_bytes']:.2f}" if both else "")
        for clock in reversed(CLOCKS):
            row += [f"{ratio(timed[clock], 'masked', other):.2f}" if timed else "" for other in ("full", "shira")]
        rows.append(row)
    header = [
        *("M params", "tokens", "checkpointed", "full MB", "masked MB", "SHiRA MB", "memory / full"),
        *("memory / SHiRA", "time / full", "time / SHiRA", "CPU s / full", "CPU s / SHiRA"),
    ]
    return format_table(header, rows)


def _place(result: Result) -> tuple[int, int, bool]:
    return int(result["cell"]["size"]), result["cell"]["tokens"], result["cell"]["checkpoint"]


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("memory", __doc__, "one", threads=2)
    made.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=["50"], help="in millions of parameters")
    made.add_argument("--tokens", type=int, default=128, help="per step, in rows of up to 128")
    made.add_argument("--checkpoint", action="store_true", help="checkpoint activations, on all sides")
    made.add_argument("--kinds", nargs="+", choices=("memory", "times"), default=["memory", "times"])
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--cell", help="of the command one: a cell as JSON")
    options = made.parse_args(arguments)

    def run() -> None:
        for size in options.sizes:
            for kind in options.kinds:
                for side in SIDES if kind == "memory" else ("all",):
                    Cell(kind, size, options.tokens, options.checkpoint, side, options.threads, options.rounds).run()

    if options.command == "one":
        Cell(**json.loads(options.cell)).measure()
    else:
        carry_out(options, run=run, table=table, pack=STORE.pack)
