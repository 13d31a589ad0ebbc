"""The picture: what is learned of a domain against what is lost in general."""

from __future__ import annotations

from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.studies.forgetting_frontier.curves import frontiers


def picture(file: Path, steps: int) -> None:
    """All runs, one panel a domain: further right is more learned, further down is less lost."""
    found = frontiers(steps)
    figure = Figure(figsize=(8 * max(1, len(found)), 6), layout="constrained")
    for axis, (domain, curves) in zip(
        figure.subplots(1, max(1, len(found)), squeeze=False)[0], found.items(), strict=True
    ):
        for number, (name, seeds) in enumerate(curves.items()):
            colour, label = colormaps["tab20"](number % 20), name
            for run in (run for runs in seeds.values() for run in runs):
                axis.plot(*zip(*run, strict=True), marker=".", lw=1, color=colour, label=label)
                label = ""
        axis.set(xlabel="learned of the domain, nats per token", ylabel="lost in general, nats per token", title=domain)
        axis.grid(color="0.92", linewidth=0.6)
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(file, dpi=110)
