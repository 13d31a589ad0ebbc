"""The table, from the stored cells."""

from __future__ import annotations

from benchmarks.common.tables import shown
from benchmarks.studies.forgetting.cells import ARMS, stored
from gatedadapters.reporting.tables import format_table

SCORES = ("domain", "domain task", "general", "general task")


def table() -> str:
    """Every study from the stored cells, and contrast minus each arm, paired by seed. Accuracies in points, losses per
    token negated: higher is better everywhere.
    """
    rows = []
    for (study, protect), arms in stored().items():
        ours = arms.get("contrast", {})
        for arm in [arm for arm in ARMS if arm in arms]:
            cells = arms[arm]
            columns, differences = [], []
            for key in SCORES:
                times = 100 if study == "encoder" or key.endswith("task") else 1
                values = {seed: cell["scores"][key] for seed, cell in cells.items() if key in cell["scores"]}
                columns.append(shown(values.values(), times=times))
                seeds = sorted(values.keys() & ours) if arm != "contrast" else []
                pairs = [ours[seed]["scores"][key] - values[seed] for seed in seeds]
                if not key.endswith("task"):
                    differences.append(shown(pairs, times=times, signed=True))
            first = next(iter(cells.values()))
            count, rate = f"{first['trained']:,}", f"{first['cell']['rate']:g}"
            rows.append([study, f"{protect:g}", arm, rate, str(len(cells)), *columns, *differences, count])
    header = ["study", "protect", "arm", "rate", "seeds", *SCORES, "contrast - arm: domain", "general", "trained"]
    return format_table(header, rows)
