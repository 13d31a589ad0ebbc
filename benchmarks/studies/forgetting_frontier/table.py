"""The tables, from the stored cells."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.store import Result
from benchmarks.common.tables import shown
from benchmarks.studies.forgetting_frontier.cells import STEPS, STORE
from benchmarks.studies.forgetting_frontier.curves import Frontier, Run, areas, frontiers, lost_at, paired
from gatedadapters.reporting.tables import format_table

LEVELS = (0.3, 0.6, 0.9, 1.2)  # nats learned of the domain, at which arms are compared
AGAINST = ("random 0.95", "lora", "full")


def table(steps: int = STEPS) -> str:
    """For each domain what every arm loses in general when equally much is learned, and pairs of arms by seed."""
    parts = []
    for domain, curves in frontiers(steps).items():
        rows = [[name, *_counts(seeds), *_levels(seeds)] for name, seeds in curves.items()]
        header = [domain, "seeds", "runs", "learned at most", *(f"lost at {level:g}" for level in LEVELS)]
        parts.append(format_table(header, rows))
        pairs = [
            [name, other, *_pair(seeds, curves[other])]
            for other in AGAINST
            for name, seeds in curves.items()
            if other in curves and name != other
        ]
        if pairs:
            parts.append(format_table(["arm", "against", "seeds", "area between, nats", "lost, ratio"], pairs))
    return "\n\n".join([*parts, keep_table()]).strip()


def keep_table() -> str:
    """How often a target for general ability was met on text that neither scores nor tries have seen."""
    found: dict[tuple[str, float], list[Result]] = {}
    for result in STORE.results().values():
        if "keep" in result:
            found.setdefault((result["keep"]["domain"], result["keep"]["target"]), []).append(result)
    rows = []
    for (domain, target), results in found.items():
        done = [result for result in results if "rise" in result]
        met = sum(result["rise"] <= target for result in done)
        columns = [[result[key] for result in done] for key in ("rise", "protect", "learned")]
        texts = [shown(columns[0], signed=True), shown(columns[1]), shown(columns[2], times=1)]
        tries = [len(result["tries"]) for result in done]
        rows.append(
            [
                domain,
                f"{target:.0%}",
                f"{met} of {len(done)}",
                str(len(results) - len(done)),
                *texts,
                shown(tries, times=1),
            ]
        )
    header = ["domain", "target", "met", "refused", "rise, %", "protected, %", "learned, nats", "tries"]
    return format_table(header, rows) if rows else ""


def _counts(seeds: Frontier) -> list[str]:
    most = [max(run[-1][0] for run in runs) for runs in seeds.values()]
    return [str(len(seeds)), str(sum(map(len, seeds.values()))), shown(most, times=1)]


def _levels(seeds: Frontier) -> list[str]:
    """The interval over seeds at each level; only where every seed got there, or the easy ones alone would count."""
    found = []
    for level in LEVELS:
        values = [lost_at(runs, level) for runs in seeds.values()]
        found.append("" if any(value != value for value in values) else shown(values, times=1, signed=True))
    return found


def _pair(first: Frontier, second: Frontier) -> list[str]:
    between = paired(first, second, _difference)
    ratios = paired(first, second, _ratio)
    return [str(len(between)), shown(between, times=1, signed=True), shown(ratios, times=1)]


def _difference(first: Sequence[Run], second: Sequence[Run]) -> float:
    one, other = areas(first, second)
    return one - other


def _ratio(first: Sequence[Run], second: Sequence[Run]) -> float:
    one, other = areas(first, second)
    return one / other if other > 0 else float("nan")
