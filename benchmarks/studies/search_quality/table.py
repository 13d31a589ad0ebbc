"""The tables, from the stored cells."""

from __future__ import annotations

from statistics import fmean

from benchmarks.common.store import Result
from benchmarks.common.tables import markdown, shown
from benchmarks.studies.search_quality.cells import ARMS, COMPARISONS, LORA, SEEDS, Cell, Comparison, read

Found = dict[str, dict[int, Result]]  # results by arm and seed


def tables() -> str:
    """Everything there is to say so far."""
    return f"{table()}\n\n{compression()}"


def table() -> str:
    """Mean test accuracy of every arm, and searched minus the arm with its 95 % interval.

    Over all tasks and budgets, a pair's value is the mean over budgets: those of one seed share data and heads.
    """
    rows: list[list[str | None]] = []
    pooled: dict[str, dict[tuple[str, int], list[float]]] = {arm: {} for arm in ARMS}
    for comparison in COMPARISONS:
        rates, found = stored(comparison)
        place = [comparison.task, f"1/{1 / comparison.budget:g}"]
        for arm, results in found.items():
            if not results:
                continue
            differences = paired(found, arm)
            for seed, difference in differences.items():
                pooled[arm].setdefault((comparison.task, seed), []).append(difference)
            versus = "" if arm == "searched" else shown(differences.values(), signed=True)
            size = max(result["params"] for result in results.values())
            mean = f"{mean_score(results):.1f}"
            rows.append([*place, arm, f"{rates[arm]:g}", str(len(results)), mean, versus, f"{size:,}"])
        mixed = paired(found, "random-mixed", ours="searched-mixed")
        if mixed:
            versus = shown(mixed.values(), signed=True)
            rows.append([*place, "searched-mixed - random-mixed", None, str(len(mixed)), None, versus, None])
    for arm, pairs in pooled.items():
        if arm != "searched" and len(pairs) > 1:
            versus = shown(map(fmean, pairs.values()), signed=True)
            rows.append(["all", None, arm, None, f"{len(pairs)} pairs", None, versus, None])
    header = ["task", "budget", "arm", "rate", "seeds", "accuracy", "searched - arm (95 %)", "parameters"]
    return markdown(header, rows)


def stored(comparison: Comparison) -> tuple[dict[str, float], Found]:
    """Tuned rates and test results of one comparison, as far as its cells are there."""
    rates = {arm: rate for arm in comparison.arms if (rate := comparison.rate(arm)) is not None}
    found: Found = {}
    for arm, rate in rates.items():
        results = {seed: read(Cell(comparison.task, comparison.budget, arm, rate, seed)) for seed in SEEDS}
        found[arm] = {seed: result for seed, result in results.items() if result is not None}
    return rates, found


def paired(found: Found, arm: str, *, ours: str = "searched") -> dict[int, float]:
    """`ours` minus `arm` in test accuracy, by seed, for the seeds that both have."""
    mine, others = found.get(ours, {}), found.get(arm, {})
    return {seed: mine[seed]["score"] - others[seed]["score"] for seed in sorted(mine.keys() & others.keys())}


def mean_score(results: dict[int, Result]) -> float:
    """Mean test accuracy in per cent; nan of no results."""
    return 100 * fmean(result["score"] for result in results.values()) if results else float("nan")


def compression() -> str:
    """For each arm, the accuracy at every budget and the smallest budget within a point of the dense candidates."""
    whole = next((comparison for comparison in COMPARISONS if comparison.budget == 1), None)
    if whole is None:
        return ""
    found = {comparison.budget: stored(comparison)[1] for comparison in COMPARISONS if comparison.task == whole.task}
    dense_results = found.pop(1.0).get("dense", {})
    if not dense_results:
        return ""
    target = mean_score(dense_results) - 1
    budgets = sorted((budget for budget, results in found.items() if results.get("searched")), reverse=True)
    rows: list[list[str | None]] = [[f"dense: {target + 1:.1f}", *[None] * (len(budgets) + 1)]]
    for arm in LORA:
        scores = {budget: mean_score(found[budget].get(arm, {})) for budget in budgets}
        near = [budget for budget, score in scores.items() if score >= target]
        smallest = f"1/{1 / min(near):g}" if near else "none"
        rows.append([arm, *(f"{score:.1f}" for score in scores.values()), smallest])
    header = [whole.task, *(f"1/{1 / budget:g}" for budget in budgets), "smallest within 1 point"]
    return markdown(header, rows)
