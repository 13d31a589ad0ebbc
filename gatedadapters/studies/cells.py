"""A sensitivity study as a list of cells to score, and the trainings that the cells need."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gatedadapters.config import CorruptionConfig, SearchConfig, StudyConfig
from gatedadapters.config.study import PERTURBATION, StudySide, Value, value_of

Assignment = Mapping[str, Value]


@dataclass(frozen=True)
class Cell:
    """One score of a study: a side, a seed and the values of the factors.

    Attributes:
        side: gated, uniform or full.
        seed: seed of the training.
        assignment: factors whose values differ from the study's search, by dotted path.
        search: the search with these values.
        perturbation: applied to the test data; None for clean data.
    """

    side: StudySide
    seed: int
    assignment: Assignment
    search: SearchConfig
    perturbation: CorruptionConfig | None

    @property
    def training(self) -> str:
        """Key of the training that the cell needs. Cells that differ only in the perturbation share one training."""
        return training_key(self.side, self.search)


@dataclass(frozen=True)
class Training:
    """One trial of a sensitivity study: it trains once and tests under every perturbation that its cells need.

    Attributes:
        key: see `training_key`.
        cell: the first cell that needs it.
        perturbations: the perturbations of the test data, beside clean data.
    """

    key: str
    cell: Cell
    perturbations: tuple[CorruptionConfig, ...]


def cells(config: StudyConfig) -> Iterator[Cell]:
    """Every cell, in the order of the seeds: a study that stops early is complete for its first seeds."""
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


def assignments(config: StudyConfig, side: StudySide) -> list[Assignment]:
    """The assignments of one side. With one factor at a time, the unchanged search comes first."""
    grids = {path: factor.grid() for path, factor in config.factors.items() if side in config.sides_of(path)}
    if config.design == "grid":
        return [dict(zip(grids, values, strict=True)) for values in itertools.product(*grids.values())]
    return [{}, *({path: value} for path, grid in grids.items() for value in grid)]


def trainings(config: StudyConfig) -> list[Training]:
    """The distinct trainings that the cells need, in the order of the cells."""
    found: dict[str, tuple[Cell, dict[str, CorruptionConfig]]] = {}
    for cell in cells(config):
        _, asked = found.setdefault(cell.training, (cell, {}))
        if cell.perturbation is not None:
            asked.setdefault(perturbation_key(cell.perturbation), cell.perturbation)
    return [Training(key, cell, tuple(asked.values())) for key, (cell, asked) in found.items()]


def training_key(side: StudySide, search: SearchConfig) -> str:
    """A name for a training that covers everything its result depends on: equal keys give equal results."""
    data = search.as_written(exclude={"perturbation", "compare", "version"})
    digest = hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
    return f"{side}-{search.training.seed}-{digest[:12]}"


def perturbation_key(perturbation: CorruptionConfig) -> str:
    """A name for a perturbation: kind, ratio and seed."""
    return f"{perturbation.kind}-{perturbation.ratio:g}-{perturbation.seed}"


def parameters(config: StudyConfig, cell: Cell) -> dict[str, Value]:
    """The parameters that Optuna stores for a training: side, seed, and every factor that has a value."""
    search = config.search_of(cell.side, {**cell.assignment})
    found: dict[str, Value] = {"side": cell.side, "seed": cell.seed}
    for path in config.factors:
        value = value_of(search, path)
        if value is not None and not path.startswith(PERTURBATION):
            found[path] = value
    return found
