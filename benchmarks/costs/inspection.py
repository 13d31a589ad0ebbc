"""What looking inside costs: the same search with TensorBoard's gates, heat maps and diffs, and without.

Claim under test: `TensorBoardInspector` takes at most 2 % of the training time of a search on the real 3-layer MiniLM,
against the same run with no TensorBoard at all; what it writes goes through the same Trainer, without user code.

    python -m benchmarks inspection run [--pairs 4] [--steps 240]
    python -m benchmarks inspection table

Each pair trains both sides from equal weights, on made-up tokens, in an order that alternates; CPU seconds of a whole
`trainer.train()`, the median of the ratios within a pair. Beside it stands the share of a run's CPU seconds that passed
within the callback, everything it does counted: the ratio is as noisy as the machine, the share is not.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

import gatedadapters as ga
from benchmarks.common.command import carry_out, parser
from benchmarks.common.store import Result, Store
from benchmarks.common.timing import CLOCKS
from gatedadapters.data.bundled import load_encoder
from gatedadapters.inspection import TensorBoardInspector
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Store("inspection")
NAME = "search"  # of the only result
BATCH, LENGTH, TASKS = 32, 32, {"one": 2, "two": 3}


class Counted(TensorBoardInspector):
    """Adds up the CPU seconds that pass within it, all threads of the process together."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.cpu = 0.0


def _counting(event: str) -> Any:
    inherited = getattr(TensorBoardInspector, event)

    def call(self: Counted, *args: Any, **kwargs: Any) -> None:
        busy = time.process_time()
        inherited(self, *args, **kwargs)
        self.cpu += time.process_time() - busy

    return call


for _event in ("on_train_begin", "on_step_begin", "on_step_end", "on_log", "on_save", "on_train_end"):
    setattr(Counted, _event, _counting(_event))


def examples(count: int, vocabulary: int) -> list[dict[str, Any]]:
    """Random tokens of two tasks by turns."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, vocabulary - 1, (count, LENGTH), generator=generator)
    return [{"input_ids": row, "task_ids": i % 2, "labels": int(row[0]) % 2} for i, row in enumerate(ids)]


def train(
    model: ga.MultiTaskClassifier, data: list[dict[str, Any]], steps: int, *, inspected: bool
) -> dict[str, float]:
    """One search; CPU and wall seconds, and what the inspector counted."""
    torch.manual_seed(0)
    ga.attach(model, "encoder-mixed", tasks=tuple(TASKS))
    with tempfile.TemporaryDirectory() as folder:
        inspector = Counted(Path(folder) / "run")
        args = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            logging_steps=max(1, steps // 60),
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            learning_rate=5e-3,
        )
        callbacks = [inspector] if inspected else []
        budget = ga.Budget(fraction=0.125)
        trainer = ga.GatedTrainer(model=model, args=args, train_dataset=data, budget=budget, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        began, busy = time.perf_counter(), time.process_time()
        trainer.train()
        found = {"cpu": time.process_time() - busy, "wall": time.perf_counter() - began}
    return {**found, "counted": inspector.cpu}


def measure(count: int, steps: int) -> Result:
    """Train both sides of every pair."""
    backbone = load_encoder("minilm-l3")[0]
    model, data = ga.MultiTaskClassifier(backbone, TASKS), examples(2048, backbone.config.vocab_size)
    train(copy.deepcopy(model), data, 10, inspected=True)  # imports and first calls of both sides
    pairs: list[dict[str, dict[str, float]]] = []
    for number in range(count):
        order = (True, False) if number % 2 else (False, True)
        sides = {"on" if on else "off": train(copy.deepcopy(model), data, steps, inspected=on) for on in order}
        pairs.append(sides)
        print(f"pair {number + 1}: " + ", ".join(f"{k} {v['cpu']:.1f} s" for k, v in sides.items()), flush=True)
    return {
        "versions": versions(),
        "steps": steps,
        "pairs": pairs,
        "ratio": {clock: statistics.median(p["on"][clock] / p["off"][clock] for p in pairs) for clock in CLOCKS},
        "counted_share": statistics.median(p["on"]["counted"] / p["on"]["cpu"] for p in pairs),
    }


def table() -> str:
    """Both sides, and whether the claim holds; nothing where nothing is stored."""
    result = STORE.read(NAME)
    if result is None:
        return ""
    off, on = (statistics.median(pair[side]["cpu"] for pair in result["pairs"]) for side in ("off", "on"))
    ratio, share = result["ratio"], result["counted_share"]
    row = [f"{off:.1f}", f"{on:.1f}", f"{ratio['cpu'] - 1:+.1%}", f"{ratio['wall'] - 1:+.1%}", f"{share:.2%}"]
    shown = format_table(["off, CPU s", "on, CPU s", "CPU", "wall", "share of CPU within it"], [row])
    verdict = "within" if share <= 0.02 else "NOT within"
    steps = result["steps"]
    return f"{shown}\n{steps} steps of MiniLM-L3, two tasks, four kinds of paths: {verdict} the claimed 2 %"


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("inspection", __doc__, threads=1)
    made.add_argument("--pairs", type=int, default=4)
    made.add_argument("--steps", type=int, default=240)
    options = made.parse_args(arguments)
    carry_out(
        options,
        run=lambda: STORE.write(NAME, measure(options.pairs, options.steps)),
        table=table,
        pack=STORE.pack,
    )
