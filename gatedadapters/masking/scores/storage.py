"""Scores of every element of a backbone, in memory or, where they do not fit, on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from gatedadapters.artefact_files import check_tensors, file_digest, opened, with_digests
from gatedadapters.backbone.fingerprint import Fingerprint
from gatedadapters.config.base import Config, read_record
from gatedadapters.errors import ArtifactError, MaskError
from gatedadapters.runtime.sharding import is_shard, on_first, whole
from gatedadapters.safe_files import whole_folder

RECORD = "scores.json"
SHARD_BYTES = 2**30


class TensorEntry(Config):
    """The shard that holds the scores of one tensor, and the tensor's shape and role."""

    shape: tuple[NonNegativeInt, ...]
    role: str = ""
    shard: NonNegativeInt = 0


class ScoresRecord(Config):
    """Scores as data. The numbers lie in shards beside the record."""

    version: Literal[1] = 1
    kind: str
    fingerprint: Fingerprint
    batches: int = 0
    examples: int = 0
    details: dict[str, Any] = Field(default_factory=dict)
    tensors: dict[str, TensorEntry]


class Scores:
    """The importance of every element: by parameter name, an fp32 tensor of the parameter's shape, at least 0.

    Of a sharded model, each process holds its part, and all processes read a tensor together, which gathers it.

    Attributes:
        record: the kind of score, the backbone, and the amount of data behind it.
    """

    record: ScoresRecord

    def __init__(self, record: ScoresRecord, values: Mapping[str, Tensor]) -> None:
        self.record, self._values = record, dict(values)

    @property
    def kind(self) -> str:
        """The kind of score."""
        return self.record.kind

    @property
    def identity(self) -> Fingerprint:
        """Fingerprint of the backbone."""
        return self.record.fingerprint

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the scored parameters."""
        return tuple(self.record.tensors)

    @property
    def roles(self) -> dict[str, str]:
        """Role of each parameter, see `masking.roles`."""
        return {name: entry.role for name, entry in self.record.tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._values:
            raise MaskError(
                "there are no scores of this parameter",
                expected=", ".join(self.names[:4]),
                got=name,
                where="Scores",
                fix="choose a name among scores.names",
            )
        return whole(self._values[name])

    def __len__(self) -> int:
        return len(self._values)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write `scores.json` and safetensors shards into `folder`, whole or not at all.

        Raises:
            ArtifactError: the folder is not free.
        """
        shards = 1 + max((entry.shard for entry in self.record.tensors.values()), default=0)
        together = any(is_shard(value) for value in self._values.values())
        values = {name: self[name].cpu() for name in self.names} if together else self._values

        def write() -> None:
            with whole_folder(folder, files=file_names(shards, folder), overwrite=overwrite) as new:
                with allocated(self.record, new) as tensors:
                    for name, value in tensors.items():
                        value.copy_(values[name])
                write_record(self.record, new)

        on_first(together, write)

    @classmethod
    def load(cls, folder: str | Path, *, verify: bool = True) -> Self:
        """Read what `save` wrote. The numbers stay on disk and are read when they are used.

        Args:
            folder: the folder.
            verify: check the digests of the files, which tell damage; this reads the numbers once. Scores of releases
                0.1 and 0.2 have none.

        Raises:
            ArtifactError: a missing, truncated, foreign or damaged file, or another version.
        """
        path = Path(folder)
        record, digests = read_record(
            ScoresRecord,
            path / RECORD,
            what="a set of saved scores",
            expected=f"a folder with {RECORD} and shards",
            fix="give the folder that Scores.save wrote",
            verify=verify,
        )
        values: dict[str, Tensor] = {}
        for shard in sorted({entry.shard for entry in record.tensors.values()}):
            file = path / shard_name(shard)
            wanted = {name: list(e.shape) for name, e in record.tensors.items() if e.shard == shard}
            with opened(file) as stored:
                found = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118
                described = {name: (piece.get_dtype(), piece.get_shape()) for name, piece in found.items()}
            if described != {name: ("F32", shape) for name, shape in wanted.items()}:
                raise ArtifactError(
                    "a shard is not the one that belongs to the record beside it",
                    expected=f"{len(wanted)} fp32 tensors",
                    got=f"{len(described)} tensors",
                    where=file,
                    fix="keep the files together, as they were saved",
                )
            check_tensors(file, digests.digest(file.name))
            values |= _mapped(file, mode="c")  # copy on write, so that nothing changes the files by accident
        return cls(record, values)


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"scores-{shard:05d}.safetensors"


def file_names(shards: int, folder: str | Path) -> frozenset[str]:
    """Names of the files that a folder of scores may hold, including those of an earlier set with more shards."""
    earlier = {path.name for path in Path(folder).glob("scores-?????.safetensors")}
    return frozenset({RECORD, *map(shard_name, range(shards)), *earlier})


def sharded(shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, str]) -> dict[str, TensorEntry]:
    """Assign tensors to shards of about `SHARD_BYTES` each, in order."""
    entries, filled = {}, 0
    for name, shape in shapes.items():
        entries[name] = TensorEntry(shape=shape, role=roles.get(name, ""), shard=filled // SHARD_BYTES)
        filled += 4 * math.prod(shape)
    return entries


def write_record(record: ScoresRecord, folder: Path) -> None:
    """Write the JSON file beside finished shards."""
    shards = sorted({shard_name(entry.shard) for entry in record.tensors.values()})
    text = json.dumps(record.model_dump(mode="json"), indent=1)
    digests = {name: file_digest(folder / name) for name in shards}
    (folder / RECORD).write_text(with_digests(text, digests), encoding="utf-8")


@contextmanager
def allocated(record: ScoresRecord, folder: Path) -> Iterator[dict[str, Tensor]]:
    """Zeros for every tensor, mapped to safetensors shards in `folder`. The system keeps in memory what fits."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted({entry.shard for entry in record.tensors.values()}):
        header: dict[str, Any] = {"__metadata__": {"format": "gatedadapters scores 1"}}
        end = 0
        for name, entry in record.tensors.items():
            if entry.shard == shard:
                size = 4 * math.prod(entry.shape)
                header[name] = {"dtype": "F32", "shape": list(entry.shape), "data_offsets": [end, end + size]}
                end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file = folder / shard_name(shard)
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        tensors |= _mapped(file, mode="r+")
    yield tensors


def _mapped(file: Path, mode: Literal["r+", "c"]) -> dict[str, Tensor]:
    """The fp32 tensors of a safetensors file, backed by it."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if first == last:
                tensors[name] = torch.zeros(shape)
                continue
            mapped = np.memmap(file, np.float32, mode, 8 + length + first, ((last - first) // 4,))
            tensors[name] = torch.from_numpy(mapped).view(shape)
    return tensors
