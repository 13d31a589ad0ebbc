"""The tables, from the stored cells."""

from __future__ import annotations

from statistics import mean

from benchmarks.common.tables import shown
from benchmarks.studies.transfer.carry import carry_cells
from benchmarks.studies.transfer.carry_table import damage_table, repairs_table
from benchmarks.studies.transfer.cells import (
    DECODER,
    DECODER_SEEDS,
    DECODER_TASK,
    DROPS,
    ENCODER,
    MASKS,
    SEEDS,
    SETTINGS,
    STORE,
    SWEEP_SEEDS,
    SWEEP_TASK,
    TASKS,
    UPDATE,
    VARIANTS,
    Cell,
    Setting,
    cell_of,
    cells,
    read,
    shift_of,
)
from gatedadapters.reporting.tables import format_table
from gatedadapters.transfer import recovery


def arms_table(setting: Setting, tasks: tuple[str, ...], seeds: tuple[int, ...]) -> str:
    """By task and variant: accuracy on both bases, differences to another variant paired by seed, and the share of what
    re-tuning that one would win. Over all tasks, a seed's value is the mean over its tasks, so that the interval counts
    seeds; of fewer re-tuned ones their number is given.
    """
    header = ["task", "arm", "seeds", "old", "direct", "re-tuned", "beside", "direct - its", "old - its", "recovery"]
    rows = []
    for names in (*((task,) for task in tasks), *([tasks] if len(tasks) > 1 else [])):
        for variant in VARIANTS:
            old, direct, retuned = accuracies(setting, names, seeds, variant)
            if not old:
                continue
            retuned = {seed: value for seed, value in retuned.items() if seed in old}
            number = f" ({len(retuned)})" if 0 < len(retuned) < len(old) else ""
            other = VARIANTS[variant][2]
            compared = [other, "", "", ""]
            theirs = accuracies(setting, names, seeds, other) if other else ({}, {}, {})
            if theirs[0]:
                compared[1:] = [
                    shown(_differences(direct, theirs[1]), signed=True),
                    shown(_differences(old, theirs[0]), signed=True),
                    recovered(direct, *theirs[1:]),
                ]
            sizes = [c["params"] for t in names for s in old if (c := read(cell_of(setting, t, variant, s)))]
            rows.append(
                [
                    names[0] if len(names) == 1 else "all",
                    variant,
                    str(len(old)),
                    shown(old.values()),
                    shown(direct.values()),
                    shown(retuned.values()) + number,
                    *compared,
                    f"{max(sizes):,}",
                ]
            )
    return format_table([*header, "params"], rows)


BySeed = dict[int, float]


def accuracies(
    setting: Setting, tasks: tuple[str, ...], seeds: tuple[int, ...], variant: str
) -> tuple[BySeed, BySeed, BySeed]:
    """Mean accuracy over tasks on the old base, after direct transfer, and re-tuned on the new base; by seed, for the
    seeds with which every task has been run.
    """

    def scores(base: str, where: str) -> BySeed:
        found = {seed: [read(cell_of(setting, task, variant, seed, base)) for task in tasks] for seed in seeds}
        return {
            seed: mean(r[where]["accuracy"] for r in results if r) for seed, results in found.items() if all(results)
        }

    return scores("old", "old"), scores("old", "direct"), scores("new", "new")


def recovered(direct: BySeed, plain: BySeed, retuned: BySeed) -> str:
    """The share of what re-tuning the plain variant wins over its direct transfer that a variant's direct transfer
    wins, with its interval.
    """
    seeds = sorted(direct.keys() & plain.keys() & retuned.keys())
    found = recovery([direct[s] - plain[s] for s in seeds], [retuned[s] - plain[s] for s in seeds])
    if found.value is None or found.interval is None:
        return "undefined"
    return f"{found.value:.0%} ({found.interval[0]:.0%} to {found.interval[1]:.0%})"


def _differences(a: BySeed, b: BySeed) -> list[float]:
    return [a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())]


def sweep_table() -> str:
    """(old, direct) accuracy by p_i and p_c, mean over seeds."""
    rows = []
    for mask in MASKS:
        row = [f"p_i {mask:g}"]
        for drop in DROPS:
            made = [Cell(ENCODER.name, SWEEP_TASK, "uniform", seed, "old", mask, drop) for seed in SWEEP_SEEDS]
            found = [result for result in map(read, made) if result is not None]
            values = [mean(r[name]["accuracy"] for r in found) for name in ("old", "direct")] if found else []
            row.append(" / ".join(f"{100 * value:.1f}" for value in values))
        rows.append(row)
    return format_table(["", *(f"p_c {drop:g}" for drop in DROPS)], rows)


def table() -> str:
    """Everything there is to say so far."""
    parts = []
    for setting in SETTINGS.values():
        moved = STORE.read(shift_of(setting))
        if moved is not None:
            more = "more" if moved["feed_forward"] > moved["attention"] else "no more"
            parts.append(
                f"{setting.name}: the update moved feed-forward outputs by {moved['feed_forward']:.1%}, attention's by "
                f"{moved['attention']:.1%}: {more}, as the method presumes they are"
            )
    made = STORE.read(UPDATE)
    if made is not None:
        losses = " and ".join(
            f"the loss on {text} from {made[key][0]:.2f} to {made[key][1]:.2f}"
            for text, key in (("held-out dialogue", "loss"), ("news", "other_loss"))
        )
        parts.append(
            f"smollm2's update: {made['steps']} steps, {made['tokens']:,} tokens of dialogue; weights moved by "
            f"{made['weight_shift']:.1%}, {losses}"
        )
    parts.append(arms_table(ENCODER, TASKS, SEEDS))
    if any(read(cell) for cell in cells() if cell.mask):
        parts.append(f"{SWEEP_TASK}, accuracy on the old / the new base:\n{sweep_table()}")
    if any(read(cell) for cell in cells() if cell.setting == DECODER.name):
        parts.append(arms_table(DECODER, (DECODER_TASK,), DECODER_SEEDS))
    if any(STORE.read(cell.name) for cell in carry_cells()):
        parts += [repairs_table(), damage_table()]
    return "\n\n".join(parts)
