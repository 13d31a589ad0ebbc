"""The table, from the stored cells."""

from __future__ import annotations

from statistics import fmean

from benchmarks.common.store import Result
from benchmarks.common.tables import markdown, shown
from benchmarks.studies.compress_lora.cells import ARMS, TASKS, cells_of, read


def table() -> str:
    """Mean test accuracy of each arm, and gated minus the arm with its 95 % interval."""
    rows: list[list[str | None]] = []
    pooled: dict[str, list[float]] = {}
    for task in TASKS:
        found: dict[tuple[float, str], dict[int, Result]] = {}
        rates: dict[str, float] = {}
        for cell in cells_of(task):
            result = read(cell)
            if result is not None:
                found.setdefault((cell.share, cell.arm), {})[cell.seed] = result
                rates[cell.arm] = cell.rate
        for share, arm in sorted(found, key=lambda key: (-key[0], ARMS.index(key[1]))):
            results, ours = found[share, arm], found.get((share, "gated"), {})
            pairs = sorted(results.keys() & ours.keys()) if arm != "gated" else []
            differences = [ours[seed]["score"] - results[seed]["score"] for seed in pairs]
            pooled.setdefault(arm, []).extend(differences)
            versus = shown(differences, signed=True) if len(pairs) > 1 else ""
            score = 100 * fmean(result["score"] for result in results.values())
            size = max(result["params"] for result in results.values())
            rate = f"{rates[arm]:g}" if rates[arm] else ""
            rows.append([task, f"1/{1 / share:g}", arm, rate, str(len(results)), f"{score:.1f}", versus, f"{size:,}"])
    for arm, differences in pooled.items():
        if len(differences) > 1:
            number, versus = f"{len(differences)} pairs", shown(differences, signed=True)
            rows.append(["all", None, arm, None, number, None, versus, None])
    header = ["task", "size", "arm", "rate", "seeds", "accuracy", "gated - arm (95 %)", "parameters"]
    return markdown(header, rows)
