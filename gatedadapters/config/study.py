"""A study as data: one search, the factors that are varied, the sides that are compared."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from gatedadapters.config.base import Config, read_yaml
from gatedadapters.config.search import SearchConfig
from gatedadapters.config.space import presets_folder
from gatedadapters.errors import ConfigError

Value = bool | int | float | str
Side = Literal["gated", "uniform", "full"]
Objective = Literal["score", "params", "gap"]
PENALTY, PERTURBATION = "penalty.", "perturbation."
_FREE = {"seeds", "trials", "retries", "description", "version"}  # may change between runs of one study
_OTHER = {"sensitivity": "optimise", "optimise": "sensitivity"}


class Factor(Config):
    """What a field of the search may be: `values`, or `points` between `low` and `high`.

    Attributes:
        values: each of them, in order.
        low, high: both ends are taken.
        log: spaced evenly on a logarithmic scale.
        points: how many a sensitivity study takes; an optimisation takes any in between.
        integer: whole numbers only.
        sides: where it is varied; default: on every side, a penalty on the gated one alone.
    """

    values: tuple[Value, ...] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False
    points: int = Field(5, ge=2)
    integer: bool = False
    sides: tuple[Side, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _range(self) -> Factor:
        if (self.values is None) == (self.low is None and self.high is None):
            raise ValueError("give either values, or low and high")
        if self.values is not None:
            if not self.values or len(set(self.values)) != len(self.values):
                raise ValueError(f"values must be given, each once, got {list(self.values)}")
            return self
        if self.low is None or self.high is None or not self.low < self.high:
            raise ValueError(f"an empty or inverted range: expected low < high, got {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range starts above 0, got low = {self.low}")
        return self

    def grid(self) -> tuple[Value, ...]:
        """The values that a sensitivity study takes."""
        if self.values is not None:
            return self.values
        assert self.low is not None
        assert self.high is not None
        steps = [step / (self.points - 1) for step in range(self.points)]
        if self.log:
            ratio = math.log(self.high / self.low)
            found = [float(f"{self.low * math.exp(step * ratio):.6g}") for step in steps]
        else:
            found = [float(f"{self.low + step * (self.high - self.low):.6g}") for step in steps]
        return tuple(dict.fromkeys(round(value) for value in found)) if self.integer else tuple(found)

    def ends(self) -> tuple[Value, ...]:
        """Values that stand for all: where they are allowed, those between them are."""
        return self.values if self.values is not None else (self.grid()[0], self.grid()[-1])


class StudyConfig(Config):
    """What `gatedadapters study` does: retrain, prune and test a search under changes of its fields.

    Attributes:
        search: what is changed: a search in place, or the path of a search YAML (see `load`).
        factors: by dotted path into the search: `penalty.weight` (the sparsity weight), `noise.ratio`, `noise.kind`,
            `perturbation.ratio`, `training.learning_rate`, `tasks.0.max_train`, ...
        mode: `sensitivity` takes every value of each factor with every seed and scores test data; `optimise` lets a
            sampler choose values, to the best score on validation data.
        design: of a sensitivity study: one factor at a time from the search as it is, or all combinations (`grid`).
        sides: what is compared, each with its own changes of the search: the `gated` structure, `uniform` LoRA of the
            budget's size, `full` fine-tuning.
        seeds: of data splits, heads, gates and batches; one training each.
        retries: how often a trial that failed is run again.
        trials: how many an optimisation runs.
        objectives: of an optimisation: one (TPE) or several (NSGA-II) of the mean `score`, the kept `params`, and the
            `gap` between scores on clean and on perturbed data.
        constraints: at most so many `params`, so large a `gap`; at least such a `score`.
        prune: stop trials of little promise early; with one objective.
    """

    version: Literal[1] = 1
    name: str = Field(min_length=1)
    description: str = ""
    mode: Literal["sensitivity", "optimise"] = "sensitivity"
    search: SearchConfig
    factors: dict[str, Factor] = Field(min_length=1)
    design: Literal["one_factor", "grid"] = "one_factor"
    sides: dict[Side, dict[str, Value]] = Field({"gated": {}}, min_length=1)
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    retries: int = Field(2, ge=0)
    trials: int = Field(50, gt=0)
    objectives: tuple[Objective, ...] = Field(("score",), min_length=1)
    constraints: dict[Objective, float] = Field(default_factory=dict)
    prune: bool = True

    @field_validator("search", mode="before")
    @classmethod
    def _given_whole(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError("the path of a search counts from a study's file: read it with StudyConfig.load")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        for name, given in (("seeds", self.seeds), ("objectives", self.objectives)):
            if len(set(given)) != len(given):
                raise ValueError(f"{name} must differ")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds are at least 0, got {min(self.seeds)}")
        for path, factor in self.factors.items():
            _check_path(path)
            self._check_sides(path, factor)
            if path.startswith(PERTURBATION) and self.mode == "optimise":
                raise ValueError(f"{path} makes the test harder, and is not to be tuned; give search: perturbation")
            for value in factor.ends():
                for side in self.sides_of(path):
                    self.search_of(side, {path: value})
        for side in self.sides:
            if self.search_of(side, {}).limit is None and side == "uniform":
                raise ValueError("uniform LoRA has the size of the budget: give the search a budget, not a penalty")
        if self.mode == "optimise":
            self._check_optimisation()
        other = {"design"} if self.mode == "optimise" else {"trials", "objectives", "constraints", "prune"}
        if unread := self.changed_fields(other):
            raise ValueError(
                f"mode: {self.mode} has no {', '.join(unread)}; say mode: {_OTHER[self.mode]}, or leave it out"
            )
        return self

    def _check_sides(self, path: str, factor: Factor) -> None:
        absent = [side for side in factor.sides or () if side not in self.sides]
        if absent:
            raise ValueError(f"{path} is varied on {', '.join(absent)}, which is none of the sides")
        if path.startswith(PENALTY) and self.sides_of(path) != ("gated",):
            raise ValueError(f"{path} holds gates down: only the gated side has any")

    def _check_optimisation(self) -> None:
        if len(self.sides) > 1:
            raise ValueError(f"an optimisation is of one side, got {', '.join(self.sides)}")
        if "gap" in (*self.objectives, *self.constraints) and self.perturbed is None:
            raise ValueError("a robustness gap needs search: perturbation, with a ratio above 0")

    @property
    def perturbed(self) -> Any:
        """The perturbation that every trial is tested under beside clean data, or None."""
        found = self.search.perturbation
        return found if found is not None and found.ratio > 0 else None

    def sides_of(self, path: str) -> tuple[Side, ...]:
        """On which sides a factor is varied."""
        own = self.factors[path].sides
        if own is None:
            own = ("gated",) if path.startswith(PENALTY) else tuple(self.sides)
        return tuple(side for side in self.sides if side in own)

    def search_of(self, side: Side, changes: Mapping[str, Value]) -> SearchConfig:
        """The search of one side under changes by dotted path.

        Raises:
            ConfigError: a change is not valid.
        """
        return changed(self.search, {**self.sides[side], **changes})

    @classmethod
    def load(
        cls, preset_or_file: str | FilePath, *, search: SearchConfig | None = None, name: str | None = None
    ) -> Self:
        """Read a preset by name or a YAML file; relative paths in it count from its folder.

        Args:
            preset_or_file: `"sensitivity"`, or a path that ends in .yaml.
            search: what is studied, in place of what the file says; noise and perturbation that it lacks stay those of
                the file.
            name: of the study, in place of what the file says.

        Raises:
            ConfigError: unknown preset, unreadable file, unknown factor, invalid value.
        """
        path = FilePath(preset_or_file)
        if path.suffix not in {".yaml", ".yml"}:
            path = presets_folder() / "studies" / f"{preset_or_file}.yaml"
            if not path.is_file():
                raise ConfigError(
                    expected=f"a preset ({', '.join(study_presets())}) or a YAML file",
                    got=repr(str(preset_or_file)),
                    where="StudyConfig.load",
                    fix="use one of the presets, or the path of a file ending in .yaml",
                )
        data = read_yaml(path)
        if isinstance(data, dict):
            given, folder = data.get("search"), path.absolute().parent
            if isinstance(given, str):
                given = SearchConfig.load(folder / given)
            elif given is not None:
                given = SearchConfig.read(given, folder, where=f"{path}: search")
            if search is not None and given is not None:
                kept = {
                    part: getattr(given, part) for part in ("noise", "perturbation") if getattr(search, part) is None
                }
                search = search.model_copy(update={part: value for part, value in kept.items() if value is not None})
            changes = {"search": search or given, "name": name}
            data = {**data, **{field: value for field, value in changes.items() if value is not None}}
        return cls.parse(data, where=str(path))

    def as_written(self) -> dict[str, Any]:
        """Plain data with paths of the search as its file names them: the same on every machine."""
        return {**self.model_dump(mode="json"), "search": self.search.as_written()}

    def to_yaml(self, folder: FilePath | None = None) -> str:
        """Text that `load` reads back, with relative paths as they count from `folder` (default: whole paths)."""
        data = self.model_dump(mode="json", exclude_defaults=True, exclude={"search"})
        return yaml.safe_dump({**data, "search": yaml.safe_load(self.search.to_yaml(folder))}, sort_keys=False)


def differing(earlier: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """The fields in which plain data of two studies make them two; seeds and the number of trials may grow."""
    return sorted(n for n in earlier.keys() | mine.keys() if n not in _FREE and earlier.get(n) != mine.get(n))


def study_presets() -> tuple[str, ...]:
    """Names of the shipped study spaces."""
    return tuple(sorted(path.stem for path in (presets_folder() / "studies").glob("*.yaml")))


def changed(search: SearchConfig, changes: Mapping[str, Value]) -> SearchConfig:
    """A search with fields changed by dotted path. A penalty takes the budget's place, and the reverse.

    Raises:
        ConfigError: no such field, or no such value.
    """
    data = search.as_written(exclude_unset=True)
    if not isinstance(search.space, str):
        data["space"] = search.space.model_dump(mode="json", exclude_none=True)
    for path, value in changes.items():
        _check_path(path)
        head, _, rest = path.partition(".")
        if head == "penalty":
            data.pop("budget", None)
        elif head == "budget":
            data.pop("penalty", None)
            if rest in {"params", "fraction", "flops"}:  # exactly one of them
                data["budget"] = {k: v for k, v in (data.get("budget") or {}).items() if k == "per_task"}
        at: Any = data
        *parents, last = path.split(".")
        for name in parents:
            if isinstance(at, list):
                if int(name) >= len(at):
                    raise ConfigError(
                        "no such factor",
                        expected=f"a number below {len(at)}",
                        got=name,
                        where=path,
                        fix="numbers count from 0",
                    )
                at = at[int(name)]
            else:
                if at.get(name) is None:
                    at[name] = {}
                at = at[name]
        at[last] = value
    named = ", ".join(f"{path} = {value}" for path, value in changes.items())
    return type(search).read(data, search.folder, where=named or "search")


def value_of(search: SearchConfig, path: str) -> Value | None:
    """What stands at a dotted path; None where nothing does."""
    at: Any = search.as_written()
    if path.startswith("budget.") and search.limit is None:
        return None
    for name in path.split("."):
        if isinstance(at, list):
            at = at[int(name)] if int(name) < len(at) else None
        elif isinstance(at, dict):
            at = at.get(name)
        else:
            return None
    found: Value | None = at
    return found


def field_paths(config: type[Config] = SearchConfig, prefix: str = "") -> Iterator[str]:
    """The dotted paths of every field that a factor may name; `N` stands for a number."""
    for name, field in config.model_fields.items():
        nested = [kind for kind in _classes(field.annotation) if issubclass(kind, Config)]
        many = "tuple" in str(field.annotation) and bool(nested)
        place = f"{prefix}{name}{'.N' if many else ''}"
        if not nested or _classes(field.annotation) - set(nested):
            yield place
        for kind in nested:
            yield from field_paths(kind, f"{place}.")


def _classes(annotation: Any) -> set[type]:
    arguments = typing.get_args(annotation)
    found = {annotation} if isinstance(annotation, type) and not arguments else set()
    return found.union(*(_classes(argument) for argument in arguments)) - {type(None)}


def _check_path(path: str) -> None:
    known = sorted(set(field_paths()))
    if re.sub(r"\.\d+(?=\.|$)", ".N", path) not in known or path in {"version", "compare", "training.seed"}:
        raise ConfigError(
            "no such factor",
            expected=f"a dotted path of a search: {', '.join(known)}",
            got=repr(path),
            where="factors",
            fix="penalty.weight is the sparsity weight; N stands for a number; seeds go into seeds",
        )
