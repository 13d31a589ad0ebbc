"""Masks: the elements of a backbone that may be tuned, with set algebra, reports and files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor, nn

from gatedadapters.artefact_files import RecordFile, read_bytes, with_digests, write_tensors
from gatedadapters.backbone.fingerprint import Fingerprint, fingerprint
from gatedadapters.config.base import Config, read_record
from gatedadapters.errors import ArtifactError, MaskError
from gatedadapters.masking.encoding import Coding, decode, encode
from gatedadapters.reporting import html
from gatedadapters.reporting.tables import format_table
from gatedadapters.safe_files import whole_folder

RECORD, CODES = "mask.json", "mask.safetensors"
FILES = frozenset({RECORD, CODES})
_HEADER = ("role", "tensors", "elements", "free", "density", "share of free")


class TensorRecord(Config):
    """The selected elements of one tensor as data. Their positions lie in the file beside the record."""

    shape: tuple[NonNegativeInt, ...]
    count: NonNegativeInt
    coding: Coding
    bytes: NonNegativeInt
    role: str = ""


class MaskRecord(Config):
    """A mask as data."""

    version: Literal[1] = 1
    fingerprint: Fingerprint
    origin: dict[str, Any] = Field(default_factory=dict)
    tensors: dict[str, TensorRecord]


class Mask:
    """A set of elements of a backbone's parameters: those that are free, that is, may be tuned.

    Masks are immutable. `a | b`, `a & b`, `a - b` and `~a` are union, intersection, difference and complement, over all
    tensors that either mask covers. Memory holds positions in the coding of the file: about one byte each at a density
    of 2 %.

    Attributes:
        identity: fingerprint of the backbone.
        origin: how the mask was selected, as plain data.
    """

    identity: Fingerprint
    origin: dict[str, Any]

    def __init__(self, record: MaskRecord, codes: Mapping[str, Tensor]) -> None:
        self._record, self._codes = record, dict(codes)
        self.identity, self.origin = record.fingerprint, record.origin

    # -- making one ----------------------------------------------------------------------------------------------------

    @classmethod
    def from_indices(
        cls,
        indices: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        identity: Fingerprint,
        roles: Mapping[str, str] | None = None,
        origin: Mapping[str, Any] | None = None,
    ) -> Self:
        """Make a mask from positions.

        Args:
            indices: sorted flat positions by parameter name, int64 (selected,).
            shapes: shapes by parameter name, of all tensors that the mask covers. Those without positions are frozen.
            identity: fingerprint of the backbone.
            roles: roles by parameter name.
            origin: how the positions were selected, as plain data.
        """
        records, codes = {}, {}
        for name, shape in shapes.items():
            found = indices.get(name, torch.empty(0, dtype=torch.int64))
            coding, codes[name] = encode(found, torch.Size(shape).numel())
            records[name] = TensorRecord(
                shape=tuple(shape),
                count=len(found),
                coding=coding,
                bytes=len(codes[name]),
                role=(roles or {}).get(name, ""),
            )
        return cls(MaskRecord(fingerprint=identity, origin=dict(origin or {}), tensors=records), codes)

    @classmethod
    def build(cls, model: nn.Module, chosen: Mapping[str, Tensor], *, heads: frozenset[str] = frozenset()) -> Self:
        """Make a mask from your own choice of elements.

        Args:
            model: the backbone, without a delta in it.
            chosen: the free elements by parameter name: a bool tensor of the parameter's shape, or flat positions.
            heads: parameters that are trained in full beside the mask and do not identify the backbone.

        Raises:
            MaskError: an unknown name, another shape, or positions that repeat or lie outside a tensor.
        """
        parameters = dict(model.named_parameters())
        indices, shapes = {}, {}
        for name, value in chosen.items():
            if name not in parameters:
                raise MaskError(
                    "no such parameter",
                    expected="names of the model's parameters",
                    got=name,
                    where="Mask.build",
                    fix="take names from model.named_parameters()",
                )
            shape = tuple(parameters[name].shape)
            indices[name], shapes[name] = _positions(name, value, shape), shape
        return cls.from_indices(indices, shapes, identity=fingerprint(model, skip=heads))

    # -- looking at it -------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters that the mask covers, including those without a selected element."""
        return tuple(self._record.tensors)

    @property
    def roles(self) -> dict[str, str]:
        """Role of each parameter, see `masking.roles`."""
        return {name: tensor.role for name, tensor in self._record.tensors.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self._tensor(name).shape

    def count(self, name: str | None = None) -> int:
        """Number of selected elements, in one parameter or in all."""
        return self._tensor(name).count if name is not None else sum(t.count for t in self._record.tensors.values())

    @property
    def size(self) -> int:
        """Number of elements in all parameters that the mask covers."""
        return sum(torch.Size(t.shape).numel() for t in self._record.tensors.values())

    @property
    def density(self) -> float:
        """Share of the elements that are selected."""
        return self.count() / max(1, self.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the positions, in memory and on disk."""
        return sum(t.bytes for t in self._record.tensors.values())

    @property
    def digest(self) -> str:
        """A digest that is equal for masks that select the same elements."""
        digest = hashlib.sha256()
        for name in sorted(name for name in self.names if self.count(name)):
            digest.update(f"{name}:{self.shape(name)};".encode())
            digest.update(self.indices(name).numpy().tobytes())
        return digest.hexdigest()[:32]

    def indices(self, name: str) -> Tensor:
        """Sorted flat positions of the selected elements in one parameter, (selected,) int64."""
        record = self._tensor(name)
        found = decode(record.coding, self._codes[name], torch.Size(record.shape).numel(), where=name)
        if len(found) != record.count:
            raise ArtifactError(
                "a mask is damaged",
                expected=f"{record.count:,} positions",
                got=f"{len(found):,}",
                where=name,
                fix="restore the file",
            )
        return found

    def dense(self, name: str) -> Tensor:
        """Whether each element is selected: bool, of the parameter's shape."""
        chosen = torch.zeros(self.shape(name), dtype=torch.bool)
        chosen.view(-1)[self.indices(name)] = True
        return chosen

    def grid(self) -> tuple[list[str], list[str], dict[tuple[str, str], tuple[int, int]]]:
        """Blocks, roles, and for each cell (block, role) the numbers of selected and of all elements.

        A parameter's block is the first number in its name, with the name of the stack if the model has several. `-` is
        the block of parameters without a number.
        """
        found = {name: re.match(r"(.*?)\.?\b(\d+)\.", name) for name in self.names}
        several = len({match[1] for match in found.values() if match}) > 1
        cells: dict[tuple[str, str], tuple[int, int]] = {}
        for name, match in found.items():
            block = "-" if match is None else f"{match[1]}.{match[2]}" if several else match[2]
            place = block, self.roles[name] or "other"
            selected, of = cells.get(place, (0, 0))
            cells[place] = selected + self.count(name), of + torch.Size(self.shape(name)).numel()
        blocks, roles = (list(dict.fromkeys(place[axis] for place in cells)) for axis in (0, 1))
        return blocks, roles, cells

    def _rows(self) -> list[list[str]]:
        rows = []
        for role, names in self._by_role().items():
            free, size = sum(map(self.count, names)), sum(torch.Size(self.shape(n)).numel() for n in names)
            rows.append(
                [role, str(len(names)), f"{size:,}", f"{free:,}", f"{free / size:.2%}", _share(free, self.count())]
            )
        return rows

    def _title(self) -> str:
        return f"{self.count():,} of {self.size:,} elements free ({self.density:.2%}), {self.nbytes:,} bytes"

    def table(self) -> str:
        """The selected elements by role, as plain text."""
        return self._title() + "\n" + format_table(_HEADER, self._rows())

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        blocks, roles, cells = self.grid()
        density = {place: selected / max(1, of) for place, (selected, of) in cells.items()}
        densest = max(density.values(), default=0.0) or 1.0
        texts = {place: f"{value:.1%}" for place, value in density.items()}
        shares = {place: value / densest for place, value in density.items()}
        by_block = html.grid(blocks, roles, texts, shares, title="share of the elements that is free")
        return html.table(_HEADER, self._rows(), title=self._title()) + html.folded("by block", by_block)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        names = set(self.names) | set(other.names)
        same = self.identity.shapes == other.identity.shapes
        return same and all(torch.equal(self._elements(name), other._elements(name)) for name in names)

    __hash__ = None  # type: ignore[assignment]

    # -- set algebra ---------------------------------------------------------------------------------------------------

    def __or__(self, other: Mask) -> Mask:
        return self._combined(other, np.union1d)

    def __and__(self, other: Mask) -> Mask:
        return self._combined(other, lambda a, b: np.intersect1d(a, b, assume_unique=True))

    def __sub__(self, other: Mask) -> Mask:
        return self._combined(other, lambda a, b: np.setdiff1d(a, b, assume_unique=True))

    def __invert__(self) -> Mask:
        every = {n: torch.arange(torch.Size(self.shape(n)).numel()) for n in self.names}
        return self._combined(self._with(every), lambda a, b: np.setdiff1d(b, a, assume_unique=True))

    def overlap(self, other: Mask) -> Overlap:
        """The elements that two masks of one backbone share, in all and by role.

        Raises:
            MaskError: the masks belong to different backbones.
        """
        both = self & other
        rows = [_row("all", list(both.names), self, other, both)]
        rows += [_row(role, names, self, other, both) for role, names in both._by_role().items()]
        return Overlap(tuple(rows))

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write `mask.json` and `mask.safetensors` into `folder`, whole or not at all.

        Raises:
            ArtifactError: the folder is not free.
        """
        with whole_folder(folder, files=FILES, overwrite=overwrite) as new:
            self.write(new)

    def write(self, folder: Path, beside: Mapping[str, str] | None = None) -> None:
        """Write the two files into an existing folder.

        Args:
            folder: the folder.
            beside: digests of further files there, which belong to the mask, by name.
        """
        digest = write_tensors(folder / CODES, self._codes, metadata={"format": "gatedadapters mask 1"})
        text = json.dumps(self._record.model_dump(mode="json"), indent=1)
        (folder / RECORD).write_text(with_digests(text, {CODES: digest, **(beside or {})}), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, *, verify: bool = True) -> Self:
        """Read what `save` wrote. Nothing in the files is executed.

        Args:
            folder: the folder.
            verify: check the digests of the files, which tell damage. Masks of releases 0.1 and 0.2 have none.

        Raises:
            ArtifactError: a missing, truncated, foreign or damaged file, or another version.
        """
        return cls.read(folder, verify=verify)[0]

    @classmethod
    def read(cls, folder: str | Path, *, verify: bool = True) -> tuple[Self, RecordFile]:
        """Like `load`; also returns the record, which has the digests of the files beside the mask."""
        path = Path(folder)
        record, file = read_record(
            MaskRecord,
            path / RECORD,
            what="a saved mask",
            expected=f"a folder with {RECORD} and {CODES}",
            fix="give the folder that Mask.save wrote",
            verify=verify,
        )
        lengths = {name: tensor.bytes for name, tensor in record.tensors.items()}
        mask = cls(record, read_bytes(path / CODES, lengths, digest=file.digest(CODES)))
        for name in mask.names:
            mask.indices(name)
        return mask, file

    # -- inside --------------------------------------------------------------------------------------------------------

    def _tensor(self, name: str) -> TensorRecord:
        if name not in self._record.tensors:
            raise MaskError(
                "the mask does not cover this parameter",
                expected=", ".join(self.names[:4]),
                got=name,
                where="Mask",
                fix="choose a name among mask.names",
            )
        return self._record.tensors[name]

    def _elements(self, name: str) -> Tensor:
        return self.indices(name) if name in self._record.tensors else torch.empty(0, dtype=torch.int64)

    def _by_role(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, tensor in self._record.tensors.items():
            found.setdefault(tensor.role or "other", []).append(name)
        return found

    def _with(self, indices: Mapping[str, Tensor]) -> Mask:
        shapes = {name: self.shape(name) for name in self.names}
        return Mask.from_indices(indices, shapes, identity=self.identity, roles=self.roles, origin=self.origin)

    def _combined(self, other: Mask, rule: Callable[[Any, Any], Any]) -> Mask:
        check_backbone(other.identity, self.identity, where="combining masks")
        shapes = {name: self.shape(name) for name in self.names} | {n: other.shape(n) for n in other.names}
        roles = other.roles | self.roles
        indices = {
            name: torch.from_numpy(rule(self._elements(name).numpy(), other._elements(name).numpy())) for name in shapes
        }
        return Mask.from_indices(indices, shapes, identity=self.identity, roles=roles)


@dataclass(frozen=True)
class OverlapRow:
    """Two masks compared on some tensors.

    Attributes:
        part: the role, or `all`.
        size: number of elements.
        first, second: number of elements that each mask selects.
        both: number of elements that both select.
    """

    part: str
    size: int
    first: int
    second: int
    both: int

    @property
    def jaccard(self) -> float:
        """Elements that both masks select, divided by those that at least one selects."""
        return self.both / max(1, self.first + self.second - self.both)

    @property
    def chance(self) -> float:
        """Number of elements that two independent masks of these densities would share."""
        return self.first * self.second / max(1, self.size)


@dataclass(frozen=True)
class Overlap:
    """The elements that two masks share; the first row counts all of them."""

    rows: tuple[OverlapRow, ...]

    @property
    def jaccard(self) -> float:
        """Jaccard index over all tensors."""
        return self.rows[0].jaccard

    _HEADER = ("role", "first", "second", "both", "by chance", "Jaccard")

    def _texts(self) -> list[list[str]]:
        return [
            [r.part, f"{r.first:,}", f"{r.second:,}", f"{r.both:,}", f"{r.chance:,.0f}", f"{r.jaccard:.3f}"]
            for r in self.rows
        ]

    def __str__(self) -> str:
        return format_table(self._HEADER, self._texts())

    def _repr_html_(self) -> str:
        return html.table(self._HEADER, self._texts())


def check_backbone(wanted: Fingerprint, found: Fingerprint, *, where: str) -> None:
    """Check that scores, a mask or a delta belong to a backbone. Heads may differ.

    Raises:
        MaskError: they do not. The error says what differs.
    """
    parts = {"model_class": "class", "shapes": "names or shapes of parameters", "values": "values of parameters"}
    differ = [text for part, text in parts.items() if getattr(wanted, part) != getattr(found, part)]
    if differ:
        raise MaskError(
            f"made for another backbone ({' and '.join(differ)} differ)",
            expected=_described(wanted),
            got=_described(found),
            where=where,
            fix="use the backbone it was made for, as it was then: no delta in it, not cast to float16, the same heads",
        )


def _described(identity: Fingerprint) -> str:
    return f"{identity.model_class} (shapes {identity.shapes[:8]}, values {identity.values[:8]})"


def _positions(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sorted flat positions, from a bool tensor of the parameter's shape or from positions in any order."""
    size = torch.Size(shape).numel()
    if value.dtype == torch.bool:
        if tuple(value.shape) != shape:
            raise MaskError(
                "a bool mask has another shape",
                expected=shape,
                got=tuple(value.shape),
                where=name,
                fix="pass the parameter's shape, or flat positions",
            )
        return value.reshape(-1).nonzero().flatten().cpu()
    found = value.reshape(-1).cpu().long().sort().values
    if value.is_floating_point() or (
        len(found) and (found[0] < 0 or found[-1] >= size or bool((found.diff() == 0).any()))
    ):
        raise MaskError(
            "these are no positions of elements",
            expected=f"distinct integers in 0..{size - 1}",
            got=f"{value.dtype}, {int(value.min())}..{int(value.max())}",
            where=name,
            fix="pass flat positions",
        )
    return found


def _row(part: str, names: list[str], first: Mask, second: Mask, both: Mask) -> OverlapRow:
    size = sum(torch.Size(both.shape(name)).numel() for name in names)
    counts = [sum(m.count(name) for name in names if name in m.names) for m in (first, second, both)]
    return OverlapRow(part, size, *counts)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"
