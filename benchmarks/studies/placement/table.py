"""The tables, from the stored cells."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean
from typing import Any

from benchmarks.common.store import Result
from benchmarks.common.tables import markdown, shown
from benchmarks.studies.placement.cells import COMMON_RATE, GUESSES, LIBRARY, SEEDS, STORE, best_rate, rates_of
from benchmarks.studies.placement.judging import Judgement, ceiling, judge

GROUPS = {  # what tables show of several regimes together
    **dict.fromkeys(("shift-pieces", "shift-leet", "shift-reviews"), "shifts"),
}
LONG = 400  # steps of a training that an allocation is compared with
Losses = dict[str, dict[int, dict[str, float]]]  # by regime, seed and structure
FIXED = ("even", "kind", "depth", "part", "role")  # what somebody may guess without looking at the data


def tables() -> str:
    """How the library's choices do, how well scores predict, which guess is the best where, and what size and what time
    it takes.
    """
    results = STORE.results()
    found = losses(results)
    parts = (arms(results), judgements(results, found), guesses(found), frontiers(results), costs(results))
    return "\n\n".join(part for part in parts if part)


def losses(results: Mapping[str, Result]) -> Losses:
    """The measured losses at the common rate."""
    found: Losses = {}
    for result in results.values():
        cell = result.get("cell")
        if cell is not None and cell["rate"] == COMMON_RATE:
            found.setdefault(cell["regime"], {}).setdefault(cell["seed"], {})[cell["structure"]] = result["loss"]
    return found


# -- arms --------------------------------------------------------------------------------------------------------------


def arms(results: Mapping[str, Result]) -> str:
    """Every arm at its best rate, and what the library chose minus it: losses, paired by seed.

    The rate of an arm has the lowest mean loss over the seeds that were trained at every rate; an arm without such a
    seed is left out.
    """
    measured: dict[tuple[str, str], dict[float, dict[int, Result]]] = {}
    for result in results.values():
        for regime, arm, cell in placed(result):
            measured.setdefault((regime, arm), {}).setdefault(cell["rate"], {})[cell["seed"]] = result
    best: dict[tuple[str, str], tuple[float, dict[int, Result]]] = {}
    for place, by_rate in measured.items():
        by_seed = {rate: {seed: found["loss"] for seed, found in seeds.items()} for rate, seeds in by_rate.items()}
        rate = best_rate(by_seed, rates_of(place[1]))
        if rate is not None:
            best[place] = rate, by_rate[rate]
    rows = []
    for regime in dict.fromkeys(regime for regime, arm in best if arm in LIBRARY):
        own = {arm: found for (name, arm), found in best.items() if name == regime}
        for arm, (rate, seeds) in sorted(own.items(), key=lambda item: fmean(r["loss"] for r in item[1][1].values())):
            tried = sum(SEEDS[0] in found for found in measured[regime, arm].values())
            losses = [result["loss"] for result in seeds.values()]
            rows.append([regime, arm, f"{rate:g} of {tried}", str(len(seeds)), f"{fmean(losses):.4f}"])
            for chosen in LIBRARY:
                ours = own[chosen][1] if chosen in own and chosen != arm else {}
                rows[-1].append(
                    shown([ours[s]["loss"] - seeds[s]["loss"] for s in seeds if s in ours], times=1, signed=True)
                )
    header = ["regime", "arm", "rate, of how many", "seeds", "loss", *(f"{chosen} - it" for chosen in LIBRARY)]
    return markdown(header, rows) if rows else ""


def placed(result: Result) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The regime and the arm that a result belongs to, and its cell; nothing of a result that is of no arm."""
    cell = result.get("arm") or result.get("cell")
    if cell is not None:
        name = cell.get("arm") or ("random" if cell["structure"] == f"random:{cell['seed']}" else cell["structure"])
        if name in (*LIBRARY, *GUESSES) or name.startswith("peft-"):
            yield cell["regime"], name, cell


# -- scores ------------------------------------------------------------------------------------------------------------


def judgements(results: Mapping[str, Result], found: Losses) -> str:
    """Each score in each regime: means over its seeds, and over the regimes of a group."""
    by_place: dict[tuple[str, str], list[tuple[Judgement, float]]] = {}
    for result in results.values():
        score = result.get("score")
        measured = found.get(score["regime"], {}).get(0, {}) if score is not None else {}
        if len(measured.keys() & result.get("values", {}).keys()) > 2:
            place = group_of(score["regime"]), score["score"]
            by_place.setdefault(place, []).append((judge(result["values"], measured), result["seconds"]))
    ceilings: dict[str, list[float]] = {}
    for regime, seeds in found.items():
        ceilings.setdefault(group_of(regime), []).append(ceiling(seeds.values()))
    order = list(dict.fromkeys(map(group_of, found)))
    rows = []
    for (group, score), pairs in sorted(by_place.items(), key=lambda item: (order.index(item[0][0]), -_tau(item[1]))):
        top, tau = fmean(ceilings[group]), _tau(pairs)
        picks = list(dict.fromkeys(judgement.pick for judgement, _ in pairs))
        rows.append(
            [
                *(group, score, f"{tau:.2f}", _number(top), _number(tau / top)),
                *(", ".join(picks[:2]) + (" ..." if len(picks) > 2 else ""),),
                f"{fmean(judgement.regret for judgement, _ in pairs):.4f}",
                _number(fmean(judgement.share for judgement, _ in pairs)),
                *(str(pairs[0][0].structures), str(len(pairs)), f"{fmean(seconds for _, seconds in pairs):.0f}"),
            ]
        )
    header = ["regime", "score", "tau", "tau of two seeds", "share of it", "picks", "regret"]
    return markdown([*header, "share of random - best", "structures", "runs", "seconds"], rows)


def group_of(regime: str) -> str:
    """The name under which tables show a regime."""
    return GROUPS.get(regime, regime)


def _tau(pairs: Iterable[tuple[Judgement, float]]) -> float:
    return fmean(judgement.tau for judgement, _ in pairs)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


# -- fixed guesses -----------------------------------------------------------------------------------------------------


def guesses(found: Losses) -> str:
    """The loss of every guess that several regimes share, minus that of the mean random structure; the lowest is bold.

    Losses of a group are means over its regimes.
    """
    columns = {group: values for group, values in by_group(found).items() if any(map(is_random, values))}
    excess = {group: _above_random(values) for group, values in columns.items()}
    fixed = {name for values in excess.values() for name in values if name.partition(":")[0] in FIXED}
    shared = [name for name in fixed if sum(name in values for values in excess.values()) > 1 or len(excess) == 1]
    rows: list[list[str | None]] = []
    for name in sorted(shared, key=lambda name: (FIXED.index(name.partition(":")[0]), name)):
        cells = [values.get(name) for values in excess.values()]
        lowest = [min(values[n] for n in shared if n in values) for values in excess.values()]
        shown = [
            None if cell is None else f"**{cell:+.4f}**" if cell == low else f"{cell:+.4f}"
            for cell, low in zip(cells, lowest, strict=True)
        ]
        rows.append([name, *shown])
    for title, of in (("best of all", min), ("worst of all", max)):
        rows.append([title, *(_named(values, of(values, key=values.__getitem__)) for values in excess.values())])
    rows.append(["mean random loss", *(f"{_mean_random(values):.4f}" for values in columns.values())])
    return markdown(["guess", *columns], rows)


def by_group(found: Losses) -> dict[str, dict[str, float]]:
    """Losses of the first seed by group and structure; of structures that all regimes of a group have measured."""
    groups: dict[str, list[dict[str, float]]] = {}
    for regime, seeds in found.items():
        groups.setdefault(group_of(regime), []).append(seeds.get(0, {}))
    return {
        group: {name: fmean(part[name] for part in parts) for name in parts[0] if all(name in part for part in parts)}
        for group, parts in groups.items()
    }


def is_random(name: str) -> bool:
    """Whether a structure was drawn from everything by chance."""
    return name.startswith("random:")


def _mean_random(values: Mapping[str, float]) -> float:
    return fmean(loss for name, loss in values.items() if is_random(name))


def _above_random(values: Mapping[str, float]) -> dict[str, float]:
    middle = _mean_random(values)
    return {name: loss - middle for name, loss in values.items()}


def _named(values: Mapping[str, float], name: str) -> str:
    return f"{values[name]:+.4f} {name}"


# -- sizes -------------------------------------------------------------------------------------------------------------


def frontiers(results: Mapping[str, Result]) -> str:
    """The loss that a probe predicts for each budget, and that of its structure, trained by itself at its best rate."""
    trained: dict[tuple[str, int], dict[int, list[float]]] = {}
    for result in results.values():
        if "point" in result:
            cell = result["point"]
            place = trained.setdefault((cell["regime"], cell["seed"]), {})
            place.setdefault(cell["number"], []).append(result["loss"])
    rows = []
    for result in results.values():
        cell = result.get("frontier")
        for number, point in enumerate(result["points"] if cell is not None else ()):
            losses = trained.get((cell["regime"], cell["seed"]), {}).get(number)
            if losses:
                place = (cell["regime"], str(cell["seed"]), f"{point['params']:,}")
                rows.append([*place, f"{point['loss']:.4f}", f"{min(losses):.4f}"])
    header = ["regime", "seed", "parameters", "predicted by the probe", "trained by itself"]
    return markdown(header, rows) if rows else ""


# -- time --------------------------------------------------------------------------------------------------------------


def costs(results: Mapping[str, Result]) -> str:
    """CPU seconds of choosing beside those of training what was found."""
    rows = []
    for result in results.values():
        if "cost" in result:
            cell = result["cost"]
            allocate, search, train = (result["times"][what]["cpu"] for what in ("allocate", "search", "train"))
            long = train * LONG / cell["steps"]
            shares = (f"{search / train:.2f}", f"{allocate / long:.1%}")
            rows.append([cell["regime"], str(cell["steps"]), *(f"{s:.0f}" for s in (train, search, allocate)), *shares])
    header = ["regime", "steps", "training, CPU s", "search", "allocate", "search / training"]
    return markdown([*header, f"allocate / training of {LONG} steps"], rows) if rows else ""
