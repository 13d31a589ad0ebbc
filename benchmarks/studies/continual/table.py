"""The tables, from the stored cells."""

from __future__ import annotations

from statistics import fmean

from benchmarks.common.tables import shown
from benchmarks.studies.continual.cells import COMPARED, OVERLAPPING, Found, results_of
from gatedadapters.reporting.tables import format_table

METRICS = {  # as a result names them, and in the table
    "op": "OP",
    "bwt": "BWT",
    "fwt": "FWT",
    "forgetting": "forgetting",
    "general_delta": "general delta",
}


def table(study: str) -> str:
    """Every arm, and selections minus what they are to beat, paired by stream; in per cent, of `smollm2-texts` in nats.
    Nothing where nothing is stored.

    CPU seconds are of a whole stream with its scores; what a probe takes is given as a share of the tuning it serves.
    """
    found, rows = results_of(study), []
    if not found:
        return ""
    times = 1 if study == "smollm2-texts" else 100
    for arm, (setting, results) in found.items():
        values = {name: [result["metrics"][name] for result in results.values()] for name in METRICS}
        stages = [stage for result in results.values() for stage in result["stages"]]
        probing, tuning = (sum(stage[name] for stage in stages) for name in ("probe_seconds", "seconds"))
        rows.append(
            [
                arm,
                " ".join(f"{value:g}" for _, value in setting),
                str(len(results)),
                *(shown((value for value in values[name] if value is not None), times=times) for name in METRICS),
                f"{fmean(stage['elements'] for stage in stages):,.0f}",
                f"{fmean(stage['bytes'] for stage in stages):,.0f}",
                f"{fmean(result['cpu_seconds'] for result in results.values()):.0f}",
                f"{probing / tuning:.0%}",
            ]
        )
    header = [
        *("arm", "setting", "streams", *METRICS.values()),
        *("elements / task", "bytes / task", "CPU s", "probe / tuning"),
    ]
    return "\n\n".join([format_table(header, rows), *differences(found, times)])


def differences(found: Found, times: float) -> list[str]:
    """Each selection minus what it is to beat; no table where there is nothing to compare."""
    rows = []
    for ours, others in COMPARED.items():
        for theirs in others:
            if ours in found and theirs in found:
                mine, own = found[ours][1], found[theirs][1]
                both = sorted(mine.keys() & own.keys())
                pairs = [
                    shown((mine[s]["metrics"][name] - own[s]["metrics"][name] for s in both), times=times, signed=True)
                    for name in ("op", "forgetting")
                ]
                rows.append([ours, theirs, str(len(both)), *pairs])
    return [format_table(["arm", "minus", "streams", "OP", "forgetting"], rows)] if rows else []


def overlaps() -> str:
    """How much of the 6-layer encoder's own selection cheap probes select, the 3-layer encoder carries, and chance
    gives: shares of elements, in per cent; a stream's value is the mean over its tasks.
    """
    found, rows = results_of("minilm-l6"), []
    itself, *others = OVERLAPPING
    own = found[itself][1]
    for arm in others:
        if arm not in found:
            continue
        other = found[arm][1]
        both = sorted(own.keys() & other.keys())
        shares = [
            fmean(jaccard(*cores) for cores in zip(own[stream]["cores"], other[stream]["cores"], strict=True))
            for stream in both
        ]
        rows.append([arm, str(len(both)), shown(shares)])
    return format_table(["6-layer encoder", "streams", "Jaccard with its own selection"], rows)


def jaccard(mine: dict[str, int], theirs: dict[str, int]) -> float:
    """Of elements selected by tensor, one of the two holding whole tensors."""
    both = sum(min(count, theirs.get(name, 0)) for name, count in mine.items())
    return both / (sum(mine.values()) + sum(theirs.values()) - both)
