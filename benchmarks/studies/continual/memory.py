"""Peak resident memory of full fine-tuning and of probe and selection, on SmolLM2-135M."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.common.store import BENCHMARKS
from benchmarks.studies.continual.arms import decoder_stream
from benchmarks.studies.continual.cells import STORE, Cell
from gatedadapters.config import ProbeConfig
from gatedadapters.continual import probe, select_core, tensors_of
from gatedadapters.continual.fitting import Recipe, fit
from gatedadapters.reporting.tables import format_table
from gatedadapters.reporting.versions import versions

SIDES = ("load", "full", "probe")


def memory() -> str:
    """Measure every side anew, each in a process of its own, and store the peaks."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks", "continual", "memory-of"]
    peaks = {}
    for side in SIDES:
        done = subprocess.run([*command, side], capture_output=True, text=True, check=True, cwd=BENCHMARKS.parent)
        peaks[side] = round(float(done.stdout.split()[-1]))
    STORE.write("memory", {"peak_mb": peaks, "versions": versions()})
    return format_table(["SmolLM2-135M", "peak resident MB"], [[side, f"{peak:,}"] for side, peak in peaks.items()])


def memory_of(side: str) -> None:
    """A few steps of one side in this process; prints the peak in MB."""
    model, stream = decoder_stream(Cell("smollm2", "sequential", (), 0))
    with tempfile.TemporaryDirectory() as folder:
        if side == "full":
            recipe = Recipe(steps=3, batch_size=4, learning_rate=1e-5, use_cpu=True)
            fit(model, stream[0].train, stream[0].collate, recipe, folder=Path(folder), seed=0)
        elif side == "probe":
            config = ProbeConfig(steps=3, batch_size=4, fisher_batches=3)
            found = probe(model, stream[0], Path(folder) / "probe", config, elements=True)
            for granularity in ("tensor", "element"):
                select_core(tensors_of(model), [found], 0, granularity=granularity)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
