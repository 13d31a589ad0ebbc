"""One set of adapters out of several: the weighted sum of what they contribute, path by path."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from itertools import chain, count

import torch

from gatedadapters.errors import ArtifactError
from gatedadapters.paths import LoRA, Path
from gatedadapters.paths.site import Point
from gatedadapters.reporting.versions import versions
from gatedadapters.structure import KeptPath, SiteRecord, Structure
from gatedadapters.supernet.adapters import Adapters
from gatedadapters.supernet.attach import DEFAULT_TASK

WHERE = "Shelf.combine"


def combine(
    members: Mapping[str, Adapters], weights: Mapping[str, float], *, rank: int | None
) -> tuple[Structure, dict[str, Path]]:
    """The structure and the paths of a weighted sum; `members` stay as they are. See `Shelf.combine`.

    Args:
        members: compact adapters of one backbone, by name.
        weights: by name.
        rank: the most ranks of a LoRA; None for the exact sum.

    Raises:
        ArtifactError: nothing to combine, a weight that is not finite, adapters with task heads or several tasks.
    """
    wrong = [name for name, weight in weights.items() if not math.isfinite(weight)]
    if not weights or wrong or (rank is not None and rank < 1):
        raise ArtifactError(
            "these adapters cannot be combined",
            expected="a finite weight for each of one or more adapters, and a rank of at least 1",
            got=f"{dict(weights)}" + ("" if rank is None else f", rank {rank}"),
            where=WHERE,
            fix='name them with their weights: shelf.combine("both", {"mood": 0.7, "topic": 0.3})',
        )
    several = [members[name] for name in weights]
    for name, member in zip(weights, several, strict=True):
        if member.head_names or len(member.tasks) > 1:
            raise ArtifactError(
                "only adapters of one task without heads of their own can be added up",
                expected="one task, no task heads",
                got=f"{', '.join(member.tasks)}; heads {', '.join(member.head_names) or 'none'}",
                where=f"{WHERE}: {name!r}",
                fix="attach(heads=()) trains and saves no heads; compact(task=) leaves one task",
            )
    groups: dict[tuple[str, Point, Point], list[Path]] = {}
    keys: dict[tuple[str, Point, Point], str] = {}
    with torch.no_grad():
        for member, weight in zip(several, weights.values(), strict=True):
            for key, path in member.typed_paths():
                place = path.kind, path.site.tap, path.site.write
                twin = copy.deepcopy(path)
                twin.scale_units(torch.full((twin.units,), float(weight)))
                groups.setdefault(place, []).append(twin)
                keys.setdefault(place, key)
        paths: dict[str, Path] = {}
        for place, parts in groups.items():
            for path in type(parts[0]).joined(parts):
                paths[_free(keys[place], paths)] = _cut(path, rank)
    named = {member.tasks for member in several}
    tasks = named.pop() if len(named) == 1 else (DEFAULT_TASK,)
    records = tuple(_record(key, path, tasks[0]) for key, path in paths.items())
    first = several[0].structure
    assert first is not None
    return Structure(
        fingerprint=first.fingerprint,
        space=first.space,
        tasks=tasks,
        paths=records,
        dense_params=sum(record.params for record in records),
        created_with=versions(),
    ), paths


def _free(key: str, taken: Collection[str]) -> str:
    """A key that no path has yet."""
    stem = key.partition("#")[0]
    return next(name for name in chain([key], (f"{stem}#{n}" for n in count(2))) if name not in taken)


def _cut(path: Path, rank: int | None) -> Path:
    """A LoRA cut to so many ranks by its singular values; other kinds as they are."""
    if rank is not None and isinstance(path, LoRA) and path.units > rank:
        best = torch.arange(rank, device=path.up.device)
        path.condense(best, torch.ones(path.units, device=path.up.device))
        path.select_units(best)
    return path


def _record(key: str, path: Path, task: str) -> KeptPath:
    path.options = path.options_of(range(path.units))
    units, params, flops = type(path).cost(path.site, path.options)
    return KeptPath(
        key=key,
        options=path.options,
        site=SiteRecord.model_validate(path.site.to_dict()),
        of=units,
        units={task: tuple(range(units))},
        params=units * params,
        flops=units * flops,
    )
