"""A study as data: a search, the factors to vary, and the sides to compare."""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from gatedadapters.config.base import Config, Seed, read_yaml
from gatedadapters.config.search import SearchConfig
from gatedadapters.config.space import presets_folder
from gatedadapters.errors import ConfigError

Value = bool | int | float | str
StudySide = Literal["gated", "uniform", "full"]
Objective = Literal["score", "params", "gap"]
PENALTY, PERTURBATION = "penalty.", "perturbation."
_MOST_VALUES = 200  # of all factors together: each is validated, on each side
_MOST_TRIALS = 10_000
_FREE = {"seeds", "trials", "retries", "description", "version"}  # fields that may change between runs of one study
_OTHER = {"sensitivity": "optimise", "optimise": "sensitivity"}


class Factor(Config):
    """The values of one field of the search: a list, or a range.

    Attributes:
        values: the list, in the order of the study.
        low: the lower end of the range, which belongs to it.
        high: the upper end, likewise.
        log: whether the range is logarithmic.
        points: number of values that a sensitivity study takes from the range. An optimisation may take any value.
        integer: whether the range has whole numbers only.
        sides: sides on which the field is varied. Default: all sides, or the gated side alone for a penalty.
    """

    values: tuple[Value, ...] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False
    points: int = Field(5, ge=2, le=_MOST_VALUES)
    integer: bool = False
    sides: tuple[StudySide, ...] | None = Field(None, min_length=1)

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
        """The values that a sensitivity study tries."""
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
        """Values to validate: all that are listed, or the ends of the range, which decide for those in between."""
        return self.values if self.values is not None else (self.grid()[0], self.grid()[-1])


class StudyConfig(Config):
    """The configuration of `gatedadapters study`, which trains, prunes and tests a search with changed fields.

    Attributes:
        name: name of the study, in the storage and in the report.
        description: a paragraph for the report.
        mode: `sensitivity` tries every value of each factor with every seed and scores test data. `optimise` lets a
            sampler choose values that give the best score on validation data.
        search: the search to change. A file may hold it in place, or the path of a search file (see `load`).
        factors: the fields to vary, by dotted path into the search: `penalty.weight` (the sparsity weight),
            `noise.ratio`, `noise.kind`, `perturbation.ratio`, `training.learning_rate`, `tasks.0.max_train`, ...
        design: how a sensitivity study combines factors. `one_factor` changes one at a time; `grid` tries all
            combinations.
        sides: the sides to compare, each with changes of the search for it alone: the `gated` structure, `uniform`
            LoRA of the budget's size, `full` fine-tuning.
        seeds: seeds of data splits, heads, gates and batches. Each seed is a training of its own.
        retries: how often a failed trial is run again.
        trials: number of trials of an optimisation.
        objectives: goals of an optimisation: the mean `score` (accuracy; where a language model answers in tokens,
            the loss, of which less is better), the `params` kept, the `gap` between scores on clean and
            on perturbed data. The sampler is TPE for one objective and NSGA-II for several.
        constraints: upper limits of `params` and `gap`, lower limit of `score` (an upper one where it is a loss).
        prune: whether an optimisation with one objective stops unpromising trials early.
    """

    version: Literal[1] = 1
    name: str = Field(min_length=1)
    description: str = ""
    mode: Literal["sensitivity", "optimise"] = "sensitivity"
    search: SearchConfig
    factors: dict[str, Factor] = Field(min_length=1)
    design: Literal["one_factor", "grid"] = "one_factor"
    sides: dict[StudySide, dict[str, Value]] = Field({"gated": {}}, min_length=1)
    seeds: tuple[Seed, ...] = Field((0, 1, 2), min_length=1)
    retries: int = Field(2, ge=0, le=_MOST_VALUES)
    trials: int = Field(50, gt=0, le=_MOST_TRIALS)
    objectives: tuple[Objective, ...] = Field(("score",), min_length=1)
    constraints: dict[Objective, float] = Field(default_factory=dict)
    prune: bool = True

    @field_validator("name")
    @classmethod
    def _no_path(cls, name: str) -> str:
        if name.startswith(".") or any(part in name for part in "/\\\0"):
            raise ValueError("files are named after a study: its name is no path and does not begin with a dot")
        return name

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
        self._check_size()
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

    def _check_size(self) -> None:
        sizes = [len(factor.values) if factor.values is not None else factor.points for factor in self.factors.values()]
        if sum(sizes) > _MOST_VALUES:
            raise ValueError(f"the factors have {sum(sizes):,} values; at most {_MOST_VALUES} are studied")
        combined = math.prod(sizes) if self.design == "grid" else 1 + sum(sizes)
        trials = combined * len(self.sides) * len(self.seeds)
        if self.mode == "sensitivity" and trials > _MOST_TRIALS:
            raise ValueError(f"about {trials:,} trials; a study has at most {_MOST_TRIALS:,}")

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
        """The perturbation under which every trial is tested, beside clean data; None without one."""
        found = self.search.perturbation
        return found if found is not None and found.ratio > 0 else None

    def sides_of(self, path: str) -> tuple[StudySide, ...]:
        """The sides on which a factor is varied."""
        own = self.factors[path].sides
        if own is None:
            own = ("gated",) if path.startswith(PENALTY) else tuple(self.sides)
        return tuple(side for side in self.sides if side in own)

    def search_of(self, side: StudySide, changes: Mapping[str, Value]) -> SearchConfig:
        """The search of one side, with changes by dotted path.

        Raises:
            ConfigError: a changed value is not valid.
        """
        return changed(self.search, {**self.sides[side], **changes})

    @classmethod
    def load(
        cls, preset_or_file: str | FilePath, *, search: SearchConfig | None = None, name: str | None = None
    ) -> Self:
        """Read a preset or a YAML file; relative paths in the file count from its folder.

        Args:
            preset_or_file: `"sensitivity"`, `"optimise"`, or a path that ends in .yaml.
            search: replaces the search in the file. Where it has no noise or perturbation, those of the file are kept.
            name: replaces the name in the file.

        Raises:
            ConfigError: an unknown preset, an unreadable file, an unknown factor or an invalid value.
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
        """Plain data, with the paths of the search as its file writes them: equal on every machine."""
        return {**self.model_dump(mode="json"), "search": self.search.as_written()}

    def to_yaml(self, folder: FilePath | None = None) -> str:
        """YAML that `load` reads back, with paths relative to `folder` (default: absolute paths)."""
        data = self.model_dump(mode="json", exclude_defaults=True, exclude={"search"})
        return yaml.safe_dump({**data, "search": yaml.safe_load(self.search.to_yaml(folder))}, sort_keys=False)


def differing(earlier: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """Names of the fields that make two configurations different studies. Seeds and the number of trials may grow.

    Args:
        earlier: plain data of a configuration.
        mine: plain data of the other one.
    """
    return sorted(n for n in earlier.keys() | mine.keys() if n not in _FREE and earlier.get(n) != mine.get(n))


def study_presets() -> tuple[str, ...]:
    """Names of the shipped study presets."""
    return tuple(sorted(path.stem for path in (presets_folder() / "studies").glob("*.yaml")))


def changed(search: SearchConfig, changes: Mapping[str, Value]) -> SearchConfig:
    """A copy of a search with fields changed by dotted path. A penalty replaces a budget, and a budget a penalty.

    Raises:
        ConfigError: an unknown field or an invalid value.
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
    """The value at a dotted path; None if the search has none there."""
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
    """The dotted paths of all fields that a factor may name; `N` stands for a position in a list."""
    for name, field in config.model_fields.items():
        nested = [kind for kind in _classes(field.annotation) if issubclass(kind, Config)]
        many = "tuple" in str(field.annotation) and bool(nested)
        place = f"{prefix}{name}{'.N' if many else ''}"
        if not nested or _classes(field.annotation) - set(nested):
            yield place
        for kind in nested:
            yield from field_paths(kind, f"{place}.")


def _classes(annotation: Any) -> set[type]:
    """The classes in a type annotation, without None."""
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
