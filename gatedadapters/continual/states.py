"""States of a model as bits on disk: snapshots, and changes between two states."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import NonNegativeInt
from safetensors import safe_open
from torch import Tensor, nn

from gatedadapters.artefact_files import RecordFile, read_all, with_digests, write_tensors
from gatedadapters.config.base import Config, read_record
from gatedadapters.errors import ArtifactError
from gatedadapters.masking.encoding import Coding, decode, encode

RECORD, BITS = "change.json", "change.safetensors"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def state_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state of a model: its parameters (tied ones once) and persistent buffers, by name."""
    stored = model.state_dict(keep_vars=True)
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if name in stored:
            yield name, buffer


def digest(model: nn.Module) -> str:
    """A digest of every bit of the model's state, as text."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in state_of(model):
        found.update(f"{name}:{tuple(value.shape)}:{value.dtype};".encode())
        raw: Any = _bits(value).cpu().view(torch.uint8).numpy()
        found.update(raw)
    return found.hexdigest()


class Snapshot:
    """A copy of a model's state in a file, which is read tensor by tensor.

    Args:
        file: is written; its folder is made.
        model: whose state is copied.
    """

    def __init__(self, file: Path, model: nn.Module) -> None:
        self.file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, dict(state_of(model)), metadata={"format": "gatedadapters snapshot 1"})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors; one tensor is in memory at a time."""
        with safe_open(self.file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                yield name, stored.get_tensor(name)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put every bit of the snapshot back into the model."""
        current = dict(state_of(model))
        for name, value in self.tensors():
            current[name].copy_(value)


class TensorChange(Config):
    """How many elements of one tensor changed, and how their positions are coded. The bits are in the file beside it.

    Attributes:
        shape: shape of the tensor.
        count: how many elements changed.
        coding: of their positions.
    """

    shape: tuple[NonNegativeInt, ...]
    count: NonNegativeInt
    coding: Coding


class ChangeRecord(Config):
    """A change as data.

    Attributes:
        before: digest of the state before.
        after: digest of the state after.
        tensors: those that changed, by name.
    """

    version: Literal[1] = 1
    before: str
    after: str
    tensors: dict[str, TensorChange]


class Change:
    """The change between two states of a model, which can be applied forwards and backwards.

    It holds the exclusive or (XOR) of the bits of every element that differs, and the positions of these elements: one
    number and about one byte for each.

    Args:
        record: the change as data.
        values: by tensor name, `where.NAME` (coded positions) and `bits.NAME` (changed,).
    """

    def __init__(self, record: ChangeRecord, values: dict[str, Tensor]) -> None:
        self.record, self._values = record, values

    @classmethod
    def between(cls, before: Snapshot, digest_before: str, model: nn.Module) -> Self:
        """The change from a snapshot to the state that the model is in.

        Args:
            before: the snapshot.
            digest_before: its digest.
            model: in the state after.
        """
        current, records, values = dict(state_of(model)), {}, {}
        for name, old in before.tensors():
            new = current[name].detach().cpu()
            bits = _bits(old) ^ _bits(new)
            positions = bits.nonzero().flatten()
            if len(positions):
                coding, values[f"where.{name}"] = encode(positions, bits.numel())
                values[f"bits.{name}"] = bits[positions]
                records[name] = TensorChange(shape=tuple(old.shape), count=len(positions), coding=coding)
        return cls(ChangeRecord(before=digest_before, after=digest(model), tensors=records), values)

    @property
    def count(self) -> int:
        """How many elements changed."""
        return sum(entry.count for entry in self.record.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of positions and bits."""
        return sum(value.numel() * value.element_size() for value in self._values.values())

    def positions(self, name: str) -> Tensor:
        """Flat positions of the elements of one tensor that changed, (changed,) int64."""
        entry = self.record.tensors.get(name)
        if entry is None:
            return torch.empty(0, dtype=torch.int64)
        return decode(entry.coding, self._values[f"where.{name}"], torch.Size(entry.shape).numel(), where=name)

    def apply(self, model: nn.Module, *, back: bool = False) -> None:
        """Take a model from the state before to the state after; with `back` the other way round.

        Raises:
            ArtifactError: the model is in another state, or the stored bits do not give the recorded state. The model
                is then left as it was.
        """
        ends = self.record.before, self.record.after
        start, end = reversed(ends) if back else ends
        found = digest(model)
        if found != start:
            raise ArtifactError(
                "the model is in another state than this change begins at",
                expected=start[:8],
                got=found[:8],
                where="Change.apply",
                fix="load the base as it was, and apply the changes in their order",
            )
        apply_changes(model, [self], end)

    def check_fits(self, model: nn.Module) -> None:
        """Check that the change is one of this model's tensors.

        Raises:
            ArtifactError: the model lacks a tensor, or has it in another shape or type.
        """
        current = dict(state_of(model))
        for name, entry in self.record.tensors.items():
            value = current.get(name)
            bits = self._values[f"bits.{name}"].dtype
            if value is None or value.shape != entry.shape or bits != _INTEGERS[value.element_size()]:
                has = "no such tensor" if value is None else f"{tuple(value.shape)} of {value.dtype}"
                raise ArtifactError(
                    "a stored change is of another model",
                    expected=f"{name} of shape {entry.shape}, changed as {bits}",
                    got=has,
                    where="StreamResult.restore",
                    fix="give the model of the stream; if it is the one, restore the folder",
                )

    @torch.no_grad()
    def xor_into(self, model: nn.Module) -> None:
        """XOR the stored bits into the weights, whatever state the model is in. Applying it twice is a no-op."""
        current = dict(state_of(model))
        for name in self.record.tensors:
            value = current[name]
            bits = _bits(value).cpu()
            bits[self.positions(name)] ^= self._values[f"bits.{name}"]
            value.copy_(bits.view(value.dtype).view(value.shape))

    def write(self, folder: Path) -> None:
        """Write the two files of the change into a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        stored = write_tensors(folder / BITS, self._values, metadata={"format": "gatedadapters change 1"})
        (folder / RECORD).write_text(
            with_digests(self.record.model_dump_json(indent=1), {BITS: stored}), encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path, *, verify: bool = True) -> Self:
        """Read what `write` wrote.

        Args:
            folder: the folder.
            verify: check the digests of the files, which tell damage.

        Raises:
            ArtifactError: files are missing, damaged or of another kind.
        """
        record, file = _read(folder, verify=verify)
        values, _ = read_all(folder / BITS, digest=file.digest(BITS))
        wanted = {f"{part}.{name}" for name in record.tensors for part in ("where", "bits")}
        change = cls(record, values)
        wrong = sorted(wanted ^ values.keys()) or [n for n in record.tensors if not change._is_whole(n)]
        if wrong:
            raise ArtifactError(
                "a stored change is damaged",
                expected=f"coded positions and bits of {len(record.tensors)} tensors",
                got=f"something else for {wrong[0]}",
                where=folder / BITS,
                fix="restore the folder",
            )
        return change

    def _is_whole(self, name: str) -> bool:
        """Whether positions and bits of a tensor are of the right types, and as many as the record says."""
        where, bits, count = (
            self._values[f"where.{name}"],
            self._values[f"bits.{name}"],
            self.record.tensors[name].count,
        )
        of_types = where.dtype == torch.uint8 and where.dim() == 1 and bits.dtype in _INTEGERS.values()
        return of_types and bits.shape == (count,) and len(self.positions(name)) == count


def read_change_record(folder: Path, *, verify: bool = True) -> ChangeRecord:
    """Read the record of a stored change without its bits.

    Raises:
        ArtifactError: the file is missing, damaged or of another kind.
    """
    return _read(folder, verify=verify)[0]


def _read(folder: Path, *, verify: bool) -> tuple[ChangeRecord, RecordFile]:
    return read_record(
        ChangeRecord,
        folder / RECORD,
        what="a stored change",
        expected=f"{RECORD} and {BITS}",
        fix="keep the folder of a stream as it was written, with keep=True",
        verify=verify,
    )


def apply_changes(model: nn.Module, changes: Sequence[Change], end: str) -> None:
    """XOR changes into the weights in their order, and check the digest of the state that this gives.

    Args:
        model: in the state that the first change starts from.
        changes: one after the other.
        end: digest of the state after the last change.

    Raises:
        ArtifactError: the state has another digest; every bit is then put back.
    """
    for change in changes:
        change.check_fits(model)
    for change in changes:
        change.xor_into(model)
    found = digest(model)
    if found != end:
        for change in reversed(changes):
            change.xor_into(model)
        raise ArtifactError(
            "stored changes do not give the state that was recorded",
            expected=end[:8],
            got=found[:8],
            where="StreamResult.restore",
            fix="restore the folder of the stream; its files were changed",
        )


def _bits(value: Tensor) -> Tensor:
    """The bits of a tensor as flat integers: a view of the same memory, or a copy if it is not contiguous."""
    return value.detach().contiguous().reshape(-1).view(_INTEGERS[value.element_size()])
