"""The tables of what is carried, repaired and predicted, from the stored cells."""

from __future__ import annotations

import numpy as np

from benchmarks.common.store import Result
from benchmarks.common.tables import shown
from benchmarks.studies.transfer.carry import CHOSEN_ON, FORMULAS, SHARES, carry_cells, damage_cells
from benchmarks.studies.transfer.cells import STORE
from benchmarks.studies.transfer.problems import PAIRS
from gatedadapters.reporting.tables import format_table
from gatedadapters.transfer import recovery

TITLES = {
    "direct": "carried as it is",
    "anew": "trained anew",
    "masking": "trained with masking",
    "dropping": "trained with dropping",
    "both": "trained with masking and dropping",
    **{f"repaired {share:.0%}": f"repaired, {share:.0%} of the steps" for share in sorted(SHARES)},
    **{f"distilled {share:.0%}": f"repaired without labels, {share:.0%}" for share in sorted(SHARES)},
    **{f"anew {share:.0%}": f"trained anew, {share:.0%} of the steps" for share in sorted(SHARES)},
}
Losses = dict[int, Result]  # by seed


def repairs_table() -> str:
    """By base, task and update: scores of every arm on the new base, and the share of what training anew recovers."""
    groups: dict[tuple[str, str, str], dict[str, Losses]] = {}
    for cell in carry_cells():
        found = STORE.read(cell.name) if cell.kind == "lora" else None
        if found is not None:
            own = groups.setdefault((cell.setting, cell.task, cell.update), {})
            own.setdefault(cell.arm, {})[cell.seed] = found
    rows = []
    for (_, task, update), by_arm in groups.items():
        if len(by_arm) > 1:  # more than a prediction's direct transfer
            rows.append([f"{task}, {update} update: old base", *_scores(by_arm.get("direct", {}), "old"), ""])
            for arm, title in TITLES.items():
                if arm in by_arm:
                    share = "" if arm in ("direct", "anew") else recovered(by_arm, arm)
                    rows.append([f"  {title}", *_scores(by_arm[arm], "new"), share])
    return format_table(["", "seeds", "loss", "accuracy", "recovered"], rows)


def recovered(by_arm: dict[str, Losses], arm: str) -> str:
    """The share of what training anew takes off direct transfer's loss that an arm takes off, with its interval."""
    direct, anew, own = (by_arm.get(name, {}) for name in ("direct", "anew", arm))
    seeds = sorted(direct.keys() & anew.keys() & own.keys())
    won, gap = ([_loss(direct, s) - _loss(side, s) for s in seeds] for side in (own, anew))
    if len(seeds) == 1 and gap[0] > 0:
        return f"{won[0] / gap[0]:.0%}"
    found = recovery(won, gap)
    if found.value is None or found.interval is None:
        return "undefined"
    return f"{found.value:.0%} ({found.interval[0]:.0%} to {found.interval[1]:.0%})"


def damage_table() -> str:
    """By formula: rank correlation of what it predicts with the rise of the loss, over adapters x updates."""
    pairs: dict[str, list[Result]] = {}
    for cell in dict.fromkeys(damage_cells()):
        found = STORE.read(cell.name)
        if found is not None:
            chosen = cell.setting == PAIRS.name and cell.task in CHOSEN_ON and cell.kind == "lora"
            pairs.setdefault("chosen on" if chosen else f"{cell.setting.split('-')[0]}, others", []).append(found)
    pairs = {name: results for name, results in pairs.items() if len(results) > 2}
    if len(pairs) > 1:
        pairs["all"] = [result for results in pairs.values() for result in results]
    rows = []
    for formula in ("predicted", "outputs moved", *FORMULAS):
        row = []
        for results in pairs.values():
            rises = [result["new"]["loss"] - result["old"]["loss"] for result in results]
            row.append(f"{rank_correlation([result['damage'][formula] for result in results], rises):.2f}")
        rows.append([formula, *row])
    return format_table(["rank correlation", *(f"{name}, {len(found)} pairs" for name, found in pairs.items())], rows)


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's rho, of numbers without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def _loss(results: Losses, seed: int) -> float:
    return float(results[seed]["new"]["loss"])


def _scores(results: Losses, base: str) -> list[str]:
    scores = [result[base] for result in results.values()]
    right = [score["accuracy"] for score in scores if "accuracy" in score]
    return [str(len(scores)), shown([score["loss"] for score in scores], times=1), shown(right)]
