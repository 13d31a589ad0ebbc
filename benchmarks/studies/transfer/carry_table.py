"""The tables of what is carried, repaired and predicted, from the stored cells."""

from __future__ import annotations

import numpy as np

from benchmarks.common.store import Result
from benchmarks.common.tables import shown
from benchmarks.studies.transfer.carry import FORMULAS, SHARES, CarryCell, carry_cells
from benchmarks.studies.transfer.cells import STORE
from benchmarks.studies.transfer.problems import DECODER, ENCODER
from gatedadapters.reporting.tables import format_table
from gatedadapters.transfer import recovery

ARMS = {
    "direct": "carried as it is",
    **{f"repaired {share:.0%}": f"repaired, {share:.0%} of the steps" for share in SHARES},
    **{f"distilled {share:.0%}": f"repaired without labels, {share:.0%}" for share in SHARES},
    **{f"anew {share:.0%}": f"trained anew, {share:.0%}" for share in SHARES},
    "anew": "trained anew",
    **{
        name: f"trained with {'masking and dropping' if name == 'both' else name}"
        for name in WEAKENED
        if WEAKENED[name]
    },
}


def repairs_table() -> str:
    """By base, task and update: the loss of every arm on the new base, and the share of what training anew recovers."""
    groups: dict[tuple[str, str, str], dict[int, Result]] = {}
    for cell in carry_cells():
        found = STORE.read(cell.name) if cell.what in ("arms", "weakened") else None
        if found is not None:
            own = groups.setdefault((cell.setting, cell.task, cell.update), {})
            own[cell.seed] = own.get(cell.seed, {}) | found
    rows = []
    for (_, task, update), by_seed in groups.items():
        rows.append([f"{task}, {update} update: old base", *_scores(list(by_seed.values()), "old"), ""])
        for arm, title in ARMS.items():
            held = [result for result in by_seed.values() if arm in result]
            if held:
                rows.append(
                    [f"  {title}", *_scores(held, arm), "" if arm in ("direct", "anew") else recovered(held, arm)]
                )
    return format_table(["", "seeds", "loss", "accuracy", "recovered"], rows)


def recovered(results: list[Result], arm: str) -> str:
    """The share of what training anew takes off direct transfer's loss that an arm takes off, with its interval."""
    held = [result for result in results if "anew" in result]
    won = [result["direct"]["loss"] - result[arm]["loss"] for result in held]
    gap = [result["direct"]["loss"] - result["anew"]["loss"] for result in held]
    if len(held) == 1 and gap[0] > 0:
        return f"{won[0] / gap[0]:.0%}"
    found = recovery(won, gap)
    if found.value is None or found.interval is None:
        return "undefined"
    return f"{found.value:.0%} ({found.interval[0]:.0%} to {found.interval[1]:.0%})"


def damage_table() -> str:
    """By formula: rank correlation of what it predicts with the rise of the loss, over adapters x updates."""
    pairs: dict[str, list[tuple[CarryCell, Result]]] = {"all": []}
    for cell in carry_cells():
        found = STORE.read(cell.name) if cell.seed == 0 and cell.what != "weakened" else None
        if found is not None:
            pairs.setdefault(cell.setting, []).append((cell, found))
            pairs["all"].append((cell, found))
    groups = [name for name in (ENCODER.name, DECODER.name, "all") if len(pairs.get(name, [])) > 2]
    rows = []
    for formula in ("predicted", *FORMULAS):
        row = []
        for name in groups:
            results = [result for _, result in pairs[name]]
            rises = [result["direct"]["loss"] - result["old"]["loss"] for result in results]
            row.append(f"{rank_correlation([result['damage'][formula] for result in results], rises):.2f}")
        rows.append([formula, *row])
    return format_table(["rank correlation", *(f"{name}, {len(pairs[name])} pairs" for name in groups)], rows)


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's rho, of numbers without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def _scores(results: list[Result], arm: str) -> list[str]:
    right = [result[arm]["accuracy"] for result in results if "accuracy" in result[arm]]
    return [str(len(results)), shown([result[arm]["loss"] for result in results], times=1), shown(right)]
