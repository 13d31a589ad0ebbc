"""The picture: what is won in a domain against what is lost in general."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.common.store import Result
from benchmarks.common.tables import interval

Arms = Mapping[str, Mapping[int, Result]]  # results by arm and seed
COLUMNS = 3
OURS = ("taylor", "fisher", "contrast", "joint", "gated")


def trade_off(found: Mapping[tuple[str, float], Arms], arms: Sequence[str], file: Path) -> None:
    """What each arm gains in the domain and loses in general, against the untouched model of the same seed: means with
    95 % intervals (of two seeds: both), one panel a study; better is up and right. A line joins an arm's shares.
    """
    studies = list(dict.fromkeys(study for study, _ in found))
    rows, columns = max(1, -(-len(studies) // COLUMNS)), max(1, min(COLUMNS, len(studies)))
    figure = Figure(figsize=(5.8 * columns, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes[len(studies) :]:
        axis.set_axis_off()
    for axis, study in zip(axes, studies, strict=False):
        shares = sorted(share for name, share in found if name == study)
        for number, arm in enumerate(arm for arm in arms if arm != "zero"):
            marks = [mark for share in shares if (mark := _gained(found[study, share], arm, study)) is not None]
            if marks:
                ours, colour = arm in OURS, colormaps["tab20"](number)
                (x, dx), (y, dy) = (zip(*side, strict=True) for side in zip(*marks, strict=True))
                axis.errorbar(
                    x,
                    y,
                    xerr=dx,
                    yerr=dy,
                    label=arm,
                    marker="o" if ours else "s",
                    ms=8 if ours else 6,
                    lw=0.7,
                    mfc=colour if ours else "white",
                    color=colour,
                    elinewidth=0.7,
                )
        unit = "points" if study == "encoder" else "nats per token"
        axis.axhline(0, color="0.6", lw=0.8)
        axis.set(xlabel=f"gained in the domain, {unit}", ylabel=f"change in general, {unit}", title=study)
        axis.grid(color="0.92", linewidth=0.6)
        axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(file, dpi=110)


def _gained(arms: Arms, arm: str, study: str) -> list[tuple[float, float]] | None:
    """(mean, half-width) of what an arm won over the untouched model, in the domain and in general."""
    zero, cells = arms.get("zero", {}), arms.get(arm, {})
    seeds, times = sorted(zero.keys() & cells), 100 if study == "encoder" else 1
    marks = []
    for key in ("domain", "general"):
        won = [times * (cells[seed]["scores"][key] - zero[seed]["scores"][key]) for seed in seeds]
        if not won:
            return None
        middle, half = interval(won)
        marks.append((middle, half if len(won) > 2 else (max(won) - min(won)) / 2))
    return marks
