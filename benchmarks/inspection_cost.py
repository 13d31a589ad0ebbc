"""What looking inside costs: the same search with TensorBoard's gates, heat maps and diffs, and without.

Claim under test: `TensorBoardInspector` takes at most 2 % of the training time of a search on the real 3-layer MiniLM,
against the same run with no TensorBoard at all; what it writes goes through the same Trainer, without user code.

    python benchmarks/inspection_cost.py [--pairs 4] [--steps 240]

Each pair trains both sides from equal weights, on made-up tokens, in an order that alternates; CPU seconds of a whole
`trainer.train()`, the median of the ratios within a pair. Beside it stands the share of a run's CPU seconds that passed
within the callback, everything it does counted: the ratio is as noisy as the machine, the share is not.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainingArguments

import gatedadapters as ga
from gatedadapters.data.bundled import load_encoder
from gatedadapters.inspection import TensorBoardInspector
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

STORE = Path(__file__).parent / "results" / "inspection_cost.json"
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


def main() -> None:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=240)
    options = parser.parse_args()
    torch.set_num_threads(1)
    backbone = load_encoder("minilm-l3")[0]
    model, data = ga.MultiTaskClassifier(backbone, TASKS), examples(2048, backbone.config.vocab_size)
    train(copy.deepcopy(model), data, 10, inspected=True)  # imports and first calls of both sides
    pairs: list[dict[str, dict[str, float]]] = []
    for number in range(options.pairs):
        order = (True, False) if number % 2 else (False, True)
        sides = {"on" if on else "off": train(copy.deepcopy(model), data, options.steps, inspected=on) for on in order}
        pairs.append(sides)
        print(f"pair {number + 1}: " + ", ".join(f"{k} {v['cpu']:.1f} s" for k, v in sides.items()), flush=True)
    ratios = {clock: statistics.median(p["on"][clock] / p["off"][clock] for p in pairs) for clock in ("cpu", "wall")}
    counted = statistics.median(p["on"]["counted"] / p["on"]["cpu"] for p in pairs)
    report = {"versions": versions(), "steps": options.steps, "pairs": pairs, "ratio": ratios, "counted_share": counted}
    STORE.parent.mkdir(exist_ok=True)
    part = STORE.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, STORE)
    off, on = (statistics.median(p[side]["cpu"] for p in pairs) for side in ("off", "on"))
    row = [f"{off:.1f}", f"{on:.1f}", f"{ratios['cpu'] - 1:+.1%}", f"{ratios['wall'] - 1:+.1%}", f"{counted:.2%}"]
    print(format_table(["off, CPU s", "on, CPU s", "CPU", "wall", "share of CPU within it"], [row]))
    verdict = "within" if counted <= 0.02 else "NOT within"
    print(f"{options.steps} steps of MiniLM-L3, two tasks, four kinds of paths: {verdict} the claimed 2 %")


if __name__ == "__main__":
    main()
