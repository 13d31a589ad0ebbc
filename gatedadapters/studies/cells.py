"""What a sensitivity study consists of: cells to be scored, and the trainings that they need."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gatedadapters.config import CorruptionConfig, SearchConfig, StudyConfig
from gatedadapters.config.study import PERTURBATION, Side, Value, value_of

Assignment = Mapping[str, Value]


@dataclass(frozen=True)
class Cell:
    """One point of a curve: a side and a seed under an assignment of factors.

    Attributes:
        assignment: what differs from the search as it is.
        search: what is trained.
        perturbation: of the test data; None where they are clean.
    """

    side: Side
    seed: int
    assignment: Assignment
    search: SearchConfig
    perturbation: CorruptionConfig | None

    @property
    def training(self) -> str:
        """Which training it needs: cells that differ in the perturbation, or in what has no effect, share one."""
        return training_key(self.side, self.search)


@dataclass(frozen=True)
class Training:
    """One trial of a sensitivity study: trained once, tested as often as its cells ask."""

    key: str
    cell: Cell
    perturbations: tuple[CorruptionConfig, ...]


def cells(config: StudyConfig) -> Iterator[Cell]:
    """Every cell, seed by seed, so that what is there early is complete for the first seeds."""
    for seed in config.seeds:
        for side in config.sides:
            for assignment in assignments(config, side):
                search = config.search_of(side, {**assignment})
                training = search.training.model_copy(update={"seed": seed})
                found = search.perturbation
                noise = search.noise if search.noise is not None and search.noise.ratio > 0 else None
                changes = {"training": training, "noise": noise, "perturbation": None}
                perturbation = found if found is not None and found.ratio > 0 else None
                yield Cell(side, seed, assignment, search.model_copy(update=changes), perturbation)


def assignments(config: StudyConfig, side: Side) -> list[Assignment]:
    """What a side's factors are set to; the search as it is comes first."""
    grids = {path: factor.grid() for path, factor in config.factors.items() if side in config.sides_of(path)}
    if config.design == "grid":
        return [dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]
    return [{}, *({path: value} for path, grid in grids.items() for value in grid)]


def trainings(config: StudyConfig) -> list[Training]:
    """The distinct trainings that the cells need, in the order in which they come."""
    found: dict[str, tuple[Cell, dict[str, CorruptionConfig]]] = {}
    for cell in cells(config):
        _, asked = found.setdefault(cell.training, (cell, {}))
        if cell.perturbation is not None:
            asked.setdefault(perturbation_key(cell.perturbation), cell.perturbation)
    return [Training(key, cell, tuple(asked.values())) for key, (cell, asked) in found.items()]


def training_key(side: Side, search: SearchConfig) -> str:
    """Names a training by everything that its result depends on."""
    data = search.as_written(exclude={"perturbation", "compare", "version"})
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    return f"{side}-{search.training.seed}-{digest[:12]}"


def perturbation_key(perturbation: CorruptionConfig) -> str:
    """Names a perturbation."""
    return f"{perturbation.kind}-{perturbation.ratio:g}-{perturbation.seed}"


def parameters(config: StudyConfig, cell: Cell) -> dict[str, Value]:
    """What is told to Optuna of a training: side, seed, and every factor that has a value."""
    search = config.search_of(cell.side, {**cell.assignment})
    found: dict[str, Value] = {"side": cell.side, "seed": cell.seed}
    for path in config.factors:
        value = value_of(search, path)
        if value is not None and not path.startswith(PERTURBATION):
            found[path] = value
    return found
