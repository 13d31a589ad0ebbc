"""The Structure, the discrete result of a search: plain data that can be printed and compared."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gatedadapters.artefact_files import DIGESTS, MOST_RECORD_BYTES, check_inside, split_record
from gatedadapters.backbone.fingerprint import Fingerprint
from gatedadapters.config import Budget, SearchSpace
from gatedadapters.config.base import Config, parse_record
from gatedadapters.config.space import AnyPathOptions
from gatedadapters.errors import ArtifactError, TaskError
from gatedadapters.paths import Path, Point, Site, path_class
from gatedadapters.reporting import html
from gatedadapters.reporting.tables import format_table
from gatedadapters.safe_files import file_errors, read_text
from gatedadapters.structure.origin import ORIGIN
from gatedadapters.untrusted import load_json

VERSIONS = (1, 2)


class PointRecord(Config):
    """A `Point` as data."""

    module: str
    side: Literal["input", "output", "weight"]
    parameter: str = ""


class SiteRecord(Config):
    """A `Site` as data."""

    tap: PointRecord
    write: PointRecord
    width_in: int = Field(gt=0)
    width_out: int = Field(gt=0)
    block: str
    block_index: int
    sublayer: str
    role: str
    traffic: float
    experts: int = 0
    transposed: bool = False
    host: str = ""
    shifts: bool = False

    def as_site(self) -> Site:
        """The site."""
        points = {name: Point(**vars(getattr(self, name))) for name in ("tap", "write")}
        return Site(**{**vars(self), **points})


class KeptPath(Config):
    """One path that stays.

    Attributes:
        key: name of the candidate.
        options: the candidate's options, with the number of units that stay as size.
        site: where the path reads and writes.
        of: number of units of the candidate.
        units: the candidate's units that each task uses.
        params: parameters stored for the path, including the routing values if there are several tasks.
        flops: flops per token of the units that stay, forward.
        open_probability: per task, the mean over kept units of P(open) when the Structure was made.
    """

    key: str
    options: AnyPathOptions
    site: SiteRecord
    of: int
    units: dict[str, tuple[int, ...]]
    params: int
    flops: float
    open_probability: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> KeptPath:
        kept = self.kept
        if not kept or kept[0] < 0 or kept[-1] >= self.of or self.options.size != len(kept):
            raise ValueError(f"{self.key}: units {self.units} do not make {self.options.size} of {self.of}")
        return self

    @property
    def kept(self) -> tuple[int, ...]:
        """Units that any task uses, sorted; these are stored."""
        return tuple(sorted({unit for units in self.units.values() for unit in units}))

    @property
    def kind(self) -> str:
        """Path kind."""
        return self.options.kind

    def build(self, generator: torch.Generator | None = None) -> Path:
        """Build the path as it is before training.

        Raises:
            PathError: the options do not fit the site.
        """
        return path_class(self.options)(self.site.as_site(), self.options, generator)


class Offer(Config):
    """Candidates of one kind and size at one role of several blocks, whether any of their units stayed or not.

    Attributes:
        sublayer: kind of the sub-layer.
        role: role of the linear map; empty for a whole sub-layer.
        kind: path kind.
        of: number of units of each candidate.
        blocks: indices of the blocks.
    """

    sublayer: str
    role: str
    kind: str
    of: int
    blocks: tuple[int, ...]


class Structure(Config):
    """The paths that stay, their sites and sizes, and their origin. It is stored as JSON; equal data compare equal.

    Attributes:
        version: of the format; 2 if there is a lineage.
        fingerprint: the backbone.
        lineage: earlier backbones that the weights were carried over from by `load_adapters(base="updated")`, oldest
            first.
        space: the search space.
        tasks: names of the tasks, in the order of the task ids.
        paths: the paths that stay.
        offered: the candidates of the search.
        dense_params: parameters of all candidates.
        seed: of the search.
        budget: the limit it was made for, if any.
        created_with: versions of the libraries.
    """

    version: Literal[1, 2] = 1
    fingerprint: Fingerprint
    lineage: tuple[Fingerprint, ...] = ()
    space: SearchSpace
    tasks: tuple[str, ...]
    paths: tuple[KeptPath, ...]
    offered: tuple[Offer, ...] = ()
    dense_params: int
    seed: int = 0
    budget: Budget | None = None
    created_with: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _versioned(self) -> Structure:
        if self.lineage and self.version == 1:
            raise ValueError("a structure with a lineage is of version 2")
        return self

    def carried_to(self, base: Fingerprint) -> Self:
        """The same structure on an updated base; the present base joins the lineage."""
        lineage = (*self.lineage, self.fingerprint)
        return self.model_copy(update={"version": 2, "fingerprint": base, "lineage": lineage})

    @property
    def params(self) -> int:
        """Adapter parameters stored."""
        return sum(path.params for path in self.paths)

    @property
    def flops(self) -> float:
        """Adapter flops per token, forward, for a batch that uses all paths."""
        return sum(path.flops for path in self.paths)

    def routing(self, path: KeptPath) -> Tensor | None:
        """Which of a path's units each task uses, (tasks, units) of 0 and 1; None for one task, which uses them all."""
        if len(self.tasks) == 1:
            return None
        return torch.tensor([[float(unit in path.units.get(task, ())) for unit in path.kept] for task in self.tasks])

    def task_params(self, task: str) -> int:
        """Number of parameters that one task uses."""
        return sum(round(p.params * len(p.units.get(task, ())) / len(p.kept)) for p in self.paths)

    def for_task(self, task: str) -> Self:
        """The part of the structure that one task uses, as a structure for that task alone.

        Raises:
            TaskError: the task is unknown.
        """
        if task not in self.tasks:
            raise TaskError(
                "this task is unknown",
                expected=f"one of {', '.join(self.tasks)}",
                got=repr(task),
                where="Structure.for_task",
                fix="name a task",
            )
        paths = []
        for record in self.paths:
            units = record.units.get(task, ())
            if units:
                each = record.params // len(record.kept) - (len(self.tasks) if len(self.tasks) > 1 else 0)
                paths.append(
                    record.model_copy(
                        update={
                            "units": {task: units},
                            "params": each * len(units),
                            "flops": record.flops / len(record.kept) * len(units),
                            "options": record.options.select([record.kept.index(unit) for unit in units]),
                            "open_probability": {t: p for t, p in record.open_probability.items() if t == task},
                        }
                    )
                )
        return self.model_copy(update={"tasks": (task,), "paths": tuple(paths)})

    def sharing(self) -> dict[str, Any]:
        """How the tasks share the units.

        Returns:
            `params_per_task`, by task; `params_used_by_n_tasks`, the number of parameters that exactly n tasks use;
            `overlap` of each pair of tasks, the units both use over those either uses.
        """
        by_count: Counter[int] = Counter()
        for path in self.paths:
            for unit in path.kept:
                by_count[sum(unit in units for units in path.units.values())] += path.params // len(path.kept)
        pairs = {}
        for i, a in enumerate(self.tasks):
            for b in self.tasks[i + 1 :]:
                sets = [{(p.key, u) for p in self.paths for u in p.units.get(t, ())} for t in (a, b)]
                pairs[f"{a} / {b}"] = len(sets[0] & sets[1]) / max(1, len(sets[0] | sets[1]))
        return {
            "params_per_task": {task: self.task_params(task) for task in self.tasks},
            "params_used_by_n_tasks": dict(sorted(by_count.items())),
            "overlap": pairs,
        }

    def diff(self, other: Structure) -> list[str]:
        """The changes from this structure to `other`, one line for each path that differs."""
        mine, theirs = ({p.key: p for p in s.paths} for s in (self, other))
        lines = []
        for key in sorted(mine.keys() | theirs.keys()):
            a, b = mine.get(key), theirs.get(key)
            if a is None and b is not None:
                lines.append(f"+ {key} ({len(b.kept)} of {b.of})")
            elif b is None and a is not None:
                lines.append(f"- {key} ({len(a.kept)} of {a.of})")
            elif a is not None and b is not None and a.units != b.units:
                lines.append(f"~ {key} ({len(a.kept)} -> {len(b.kept)} of {b.of})")
        return lines

    def grid(self, task: str | None = None) -> tuple[list[int], list[str], dict[tuple[int, str], tuple[int, int]]]:
        """The structure as a grid of blocks and columns, for tables and pictures.

        Args:
            task: count the units that this task uses; default: those that any task uses.

        Returns:
            The blocks; the columns (see `column`), in order of the forward pass; and for each cell the units kept and
            the units offered.
        """
        cells: dict[tuple[int, str], tuple[int, int]] = {}
        for offer in self.offered:
            for block in offer.blocks:
                _add(cells, (block, column(offer.sublayer, offer.role, offer.kind)), 0, offer.of)
        for path in self.paths:
            kept = path.kept if task is None else path.units.get(task, ())
            cell = path.site.block_index, column(path.site.sublayer, path.site.role, path.kind)
            _add(cells, cell, len(kept), 0 if self.offered else path.of)
        columns = list(dict.fromkeys(column for _, column in cells))
        return sorted({block for block, _ in cells}), columns, cells

    def table(self) -> str:
        """The structure as text: a row per block, a column per (sub-layer, role, kind), units kept of units offered."""
        rows, columns, cells = self.grid()
        texts = {cell: f"{kept}/{of}" if kept else "-" for cell, (kept, of) in cells.items()}
        body = [[str(row), *(texts.get((row, column), "") for column in columns)] for row in rows]
        return self._title() + "\n" + format_table(["block", *columns], body)

    def _title(self) -> str:
        share = self.params / self.dense_params if self.dense_params else 0.0
        return f"{self.params:,} parameters in {len(self.paths)} paths ({share:.1%} of the dense candidates)"

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        parts = [self._html(None, f"{self._title()}; colours: the share of the offered units that stay")]
        if len(self.tasks) > 1:
            parts += [html.folded(f"{t}: uses {self.task_params(t):,}", self._html(t, "")) for t in self.tasks]
        return "".join(parts)

    def _html(self, task: str | None, title: str) -> str:
        blocks, columns, cells = self.grid(task)
        params = dict.fromkeys(blocks, 0)
        for path in self.paths:
            used = len(path.kept) if task is None else len(path.units.get(task, ()))
            params[path.site.block_index] += round(path.params * used / len(path.kept))
        texts = {cell: f"{kept}/{of}" for cell, (kept, of) in cells.items() if kept}
        shares = {cell: kept / of for cell, (kept, of) in cells.items()}
        return html.grid(blocks, columns, texts, shares, title=title, ends=params, end="parameters")

    def to_json(self) -> str:
        """JSON text with one line per path, so that two structures can be compared line by line."""
        data = self.model_dump(mode="json", exclude_none=True, exclude=None if self.lineage else {"lineage"})
        lines = []
        for key, value in data.items():
            if key in {"paths", "offered"} and value:
                rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in value)
                lines.append(f' "{key}": [\n{rows}\n ]')
            else:
                lines.append(f' "{key}": {json.dumps(value, ensure_ascii=False)}')
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str = "structure", verify: bool = True) -> Self:
        """Inverse of `to_json`; also reads what `Adapters.save` wrote.

        Args:
            text: JSON.
            where: its origin, for errors.
            verify: check the digest that a saved structure has.

        Raises:
            ArtifactError: the text is not JSON, is of another version, was changed since it was saved, or has unknown
                or missing keys.
        """
        try:
            data = load_json(text)
            if not isinstance(data, dict):
                raise ValueError(f"a JSON {type(data).__name__} instead of an object")
        except ValueError as error:
            raise _no_structure(error, where) from error
        saved = DIGESTS in data  # a structure alone has no digest
        data = split_record(data, where, verify=verify and saved, what="a Structure", versions=VERSIONS).data
        return cls.of_record(data, where=where)

    @classmethod
    def of_record(cls, data: Mapping[str, Any], *, where: str | FilePath) -> Self:
        """The structure that a record (plain data without digests) describes.

        Raises:
            ArtifactError: unknown or missing keys, or values of another type.
        """
        own = {key: value for key, value in data.items() if key != ORIGIN}  # it says what the structure is not
        return parse_record(cls, own, what="a Structure", where=where)

    @classmethod
    def load(cls, file: str | FilePath, *, verify: bool = True) -> Self:
        """Read a JSON file, or the one in the folder of a saved artefact.

        Args:
            file: the file or the folder.
            verify: check the digest that a saved structure has.

        Raises:
            ArtifactError: the file is missing, truncated, foreign or damaged.
        """
        path = FilePath(file)
        with file_errors("read the structure", path):
            path = path / "structure.json" if path.is_dir() else path
        check_inside(path)
        try:
            return cls.from_json(read_text(path, most=MOST_RECORD_BYTES), where=str(path), verify=verify)
        except ArtifactError:
            raise
        except (OSError, ValueError) as error:
            raise _no_structure(error, path) from error


def _no_structure(error: Exception, where: object) -> ArtifactError:
    return ArtifactError(
        "the structure cannot be read",
        expected="a Structure as JSON",
        got=str(error),
        where=where,
        fix="give the folder of a saved adapter; if it is one, structure.json is truncated: copy or save it again",
    )


def column(sublayer: str, role: str, kind: str) -> str:
    """The name of a column in tables and pictures, such as `ffn.down lora`."""
    short = {"attention": "attn", "feed_forward": "ffn", "cross_attention": "cross", "mixer": "mixer"}
    return f"{short.get(sublayer, sublayer)}{'.' + role if role else ''} {kind}"


def _add(cells: dict[tuple[int, str], tuple[int, int]], cell: tuple[int, str], kept: int, offered: int) -> None:
    before = cells.get(cell, (0, 0))
    cells[cell] = before[0] + kept, before[1] + offered
