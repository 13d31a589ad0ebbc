"""Does a gated search make an existing LoRA smaller at less loss than truncating it by singular values?

Claim under test: a LoRA of rank 8 at every linear map, trained with peft on a real task, keeps more test accuracy when
`import_peft`, gates and a budget cut it to 1/4 or 1/8 of its parameters than after plain truncation (the largest
singular values of all modules, no training), and no less than after truncation and as many steps of fine-tuning as the
gated run takes in all. A random choice of ranks, fine-tuned likewise, is the control. Learning rates of the trained
arms are chosen on validation data with another seed; scores on test data, at the final size.

    python -m benchmarks compress_lora run       # computes the cells that are missing
    python -m benchmarks compress_lora table     # prints the table from the stored cells

A killed run goes on where it stopped. Everything computes in fp32, so that machines without fast bf16 agree.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

import gatedadapters as ga
from benchmarks.common.command import carry_out, parser
from benchmarks.common.store import Result
from benchmarks.studies.compress_lora.arms import BY_NAME, bench, trained_lora
from benchmarks.studies.compress_lora.cells import STORE, TASKS, Cell, cells_of
from benchmarks.studies.compress_lora.table import table
from gatedadapters.reporting.versions import versions


def compute(cell: Cell) -> Result:
    """Make one LoRA smaller, and score it."""
    on = bench(cell.task, cell.seed)
    folder = trained_lora(on, cell.seed)
    model = on.build()
    began, spent = time.perf_counter(), time.process_time()
    adapters = ga.import_peft(model, folder, seed=cell.seed)
    BY_NAME[cell.arm](on, model, adapters, cell)
    return {
        "cell": asdict(cell),
        "score": on.accuracy(model, cell.split),
        "params": adapters.structure.params,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - spent, 1),
        "structure": {record.key: len(record.kept) for record in adapters.structure.paths},
        "versions": versions(),
    }


def run(cell: Cell) -> Result:
    """The result of a cell, computed if nobody has."""
    return STORE.computed(cell.name, lambda: compute(cell))


def run_all() -> None:
    """Compute what is missing, task by task."""
    for task in TASKS:
        for cell in cells_of(task, run):
            result = run(cell)
            print(f"{cell.task} 1/{1 / cell.share:g} {cell.arm} seed {cell.seed}: {result['score']:.3f}", flush=True)


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    options = parser("compress_lora", __doc__, threads=1).parse_args(arguments)
    carry_out(options, run=run_all, table=table, pack=STORE.pack)
