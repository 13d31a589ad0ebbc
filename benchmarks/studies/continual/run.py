"""Does tuning a selected core, task after task, forget less than tuning everything, and is it the selection?

Claims under test, on one stream of real tasks in several orders, every arm in the same runner for the same steps with
settings tuned on validation data: `l2_fisher` forgets less than sequential full fine-tuning and sequential LoRA, and
its score over all tasks (OP) is above both and above random tensors of exactly as many elements.
`l2_fisher` ranks whole tensors, as released; `l2_fisher-matrices` leaves vectors and embeddings out, and
`l2_fisher-elements` ranks single elements by the same quantity. Each has its random control of as many elements.
Does a probe below 30 % of the tuning it serves select as well? `-short` takes a third of its steps and half of its
batches, `-gradient` one pass over a few batches and no step.

    python -m benchmarks continual run [--study minilm-l3] [--arms l2_fisher ...] [--streams 0 1]
    python -m benchmarks continual table [--study minilm-l3]
    python -m benchmarks continual picture DIR [--study minilm-l3]
    python -m benchmarks continual carry [--streams 0]   # cheap probes and 3-layer cores on the 6-layer encoder
    python -m benchmarks continual memory                # probe and selection beside full fine-tuning, SmolLM2-135M

Studies: `minilm-l3` and `minilm-l6` learn five text-classification tasks without any trained head: a text is of the
class whose name the encoder puts nearest (`label_matching`), so that what is learnt, and forgotten, is the backbone's;
general ability is read out by nearest class means on a sixth. `smollm2` learns three multiple-choice tasks. Each stream
has an order and a seed of its own. `smollm2-texts` learns two languages, dialogue, tales and questions in three orders
of three seeds; its scores are minus losses in nats per token, and English news measure general ability. A killed run
goes on where it stopped.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import gatedadapters as ga
from benchmarks.common.command import carry_out, parser
from benchmarks.common.store import Result
from benchmarks.studies.continual.arms import strategy_of, stream_of, training_of
from benchmarks.studies.continual.cells import (
    ARMS,
    OVERLAPPING,
    STORE,
    STUDIES,
    Cell,
    cells_of,
    results_of,
    tuned,
)
from benchmarks.studies.continual.memory import memory, memory_of
from benchmarks.studies.continual.table import overlaps, table
from gatedadapters.continual import StreamResult
from gatedadapters.inspection import save_stream_png
from gatedadapters.reporting.versions import versions


def compute(cell: Cell) -> Result:
    """One cell, from the pretrained model to its matrix."""
    model, stream = stream_of(cell)
    strategy = strategy_of(cell)
    began, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="gatedadapters-") as folder:
        result = ga.run_stream(model, stream, strategy, training=training_of(cell), folder=Path(folder) / "stream")
        cores = [{name: len(found) for name, found in core.indices.items()} for _, core in result.cores()]
    if "source" in result.record.strategy:  # of a smaller model's stream: its name, not where this machine has it
        result.record.strategy["source"] = Path(result.record.strategy["source"]).name
    return {
        "cell": asdict(cell),
        **result.to_data(),
        "reports": [stage.report for stage in result.stages],
        "cores": cores if cell.arm != "lota" else [],
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "versions": versions(),
    }


def run(cell: Cell) -> Result:
    """The result of a cell, computed if nobody has."""
    return STORE.computed(cell.name, lambda: compute(cell))


def run_all(study: str, arms: Sequence[str], streams: Sequence[int] | None) -> None:
    """Compute what is missing, arm by arm; of some streams, or of all."""
    for arm in arms:
        if arm == "carried" and study != "minilm-l6":
            continue
        setting = tuned(study, arm, run)
        assert setting is not None
        for cell in cells_of(study, arm, setting):
            if streams is None or cell.stream in streams:
                found = run(cell)
                metrics = found["metrics"]
                print(
                    f"{study} {arm} {dict(setting)} stream {cell.stream}: OP {metrics['op']:.3f}, "
                    f"forgetting {metrics['forgetting']}, {found['cpu_seconds']} CPU s",
                    file=sys.stderr,
                )


def picture(study: str, folder: Path) -> None:
    """R of every arm's first stream as a heat map."""
    folder.mkdir(parents=True, exist_ok=True)
    for arm, (_, results) in results_of(study).items():
        first = results[min(results)]
        save_stream_png(StreamResult.of(first), folder / f"{study}-{arm}.png", title=arm)


def main(arguments: Sequence[str]) -> None:
    """See the module's docstring."""
    made = parser("continual", __doc__, "picture", "carry", "memory", "memory-of")
    made.add_argument("target", nargs="?", default=".", help="folder of pictures")
    made.add_argument("--study", choices=STUDIES, default="minilm-l3")
    made.add_argument("--arms", nargs="*", choices=ARMS, default=ARMS)
    made.add_argument("--streams", nargs="*", type=int, help="default: all")
    options = made.parse_args(arguments)
    if options.command == "picture":
        picture(options.study, Path(options.target))
    elif options.command == "carry":
        run_all("minilm-l6", OVERLAPPING, options.streams)
        print(overlaps(), table("minilm-l6"), sep="\n\n")
    elif options.command == "memory":
        print(memory())
    elif options.command == "memory-of":
        memory_of(options.target)
    else:
        carry_out(
            options,
            run=lambda: run_all(options.study, options.arms, options.streams),
            table=lambda: table(options.study),
            pack=STORE.pack,
        )
