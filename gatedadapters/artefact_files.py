"""The two kinds of file that an artefact consists of: a JSON record, and tensors in safetensors files beside it.

Every record holds digests, so that damage is noticed when the artefact is read:

    {"version": 1, ..., "digests": {"record": "9f2c...", "adapters.safetensors": "block-crc32:51ab..."}}

`record` covers everything else in the record, the other digests included. The others cover names, types, shapes and
bits of the tensors in a file. They tell damage, not forgery: whoever changes a file on purpose can change its digest.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from gatedadapters.errors import ArtifactError
from gatedadapters.safe_files import file_errors, listed, read_text
from gatedadapters.untrusted import load_json

logger = logging.getLogger(__name__)

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
DIGESTS, RECORD = "digests", "record"
MOST_RECORD_BYTES = 2**25  # a record of 10,000 paths takes 6 MB
MOST_HEADER_BYTES = 2**24  # of a safetensors file; 10,000 tensors take about 1 MB
_ALGORITHM = "block-crc32"
_BLOCK = 512  # bytes
_PART = 2**22  # bytes that are checked at once: for less, another thread costs more than it saves


# -- records -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordFile:
    """A JSON record as it was read.

    Attributes:
        data: the record without its digests.
        digests: of the files beside it, by name; None if the record has none, or nobody wants them checked.
        where: the file.
        own: digest of the record itself; None as for the others.
    """

    data: dict[str, Any]
    digests: Mapping[str, str] | None
    where: Path
    own: str | None = None

    def digest(self, name: str) -> str | None:
        """The digest that the tensors in a file beside the record must have; None if they are not checked.

        Raises:
            ArtifactError: the record has digests, but none of this file.
        """
        if self.digests is not None and name not in self.digests:
            raise ArtifactError(
                "a file does not belong to the record beside it",
                expected=f"files with a digest: {', '.join(self.digests) or 'none'}",
                got=name,
                where=self.where,
                fix="keep the files of one artefact together, as they were saved",
            )
        return None if self.digests is None else self.digests[name]


def with_digests(text: str, tensors: Mapping[str, str] | None = None) -> str:
    """The text of a JSON object with digests as its last entry.

    Args:
        text: a JSON object with at least one entry.
        tensors: what `write_tensors` returned, by the name of the file.
    """
    tensors = dict(tensors or {})
    return with_entry(text, DIGESTS, {RECORD: record_digest(load_json(text), tensors), **tensors})


def with_entry(text: str, name: str, value: Any) -> str:
    """The text of a JSON object with one more entry at its end."""
    entry = f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}"
    return f"{text.rstrip().removesuffix('}').rstrip()},\n {entry}\n}}\n"


def own_digest(text: str) -> str:
    """The digest of the record itself in what `with_digests` returned."""
    return str(load_json(text)[DIGESTS][RECORD])


def read_record_file(
    path: str | Path, *, verify: bool = True, what: str = "a record", versions: Collection[int] | None = None
) -> RecordFile:
    """Read a JSON record that `with_digests` made, or one of release 0.1 or 0.2, which wrote none.

    Args:
        path: the file.
        verify: check the record against its digest. Without, nothing beside it is checked either.
        what: the artefact, for errors: "a saved mask".
        versions: those that are known; None if such records have no version.

    Raises:
        OSError: there is no such file.
        ValueError: it is no JSON object, or exceeds the limits of `untrusted`.
        ArtifactError: the record was changed since it was saved, is of an unknown version, or is a link to elsewhere.
    """
    path = Path(path)
    check_inside(path)
    data = load_json(read_text(path, most=MOST_RECORD_BYTES))
    if not isinstance(data, dict):
        raise ValueError(f"a JSON {type(data).__name__} instead of an object")
    return split_record(data, path, verify=verify, what=what, versions=versions)


def split_record(
    data: Mapping[str, Any],
    where: str | Path,
    *,
    verify: bool = True,
    what: str = "a record",
    versions: Collection[int] | None = None,
) -> RecordFile:
    """Separate a record from its digests, and check it; for arguments and errors see `read_record_file`."""
    where = Path(where)
    version = data.get("version")
    if versions is not None and (type(version) is not int or version not in versions):
        raise ArtifactError(
            f"this version of {what} is unknown",
            expected=f"{what} of version {' or '.join(map(str, versions))}",
            got=f"version {version!r:.40}",
            where=where,
            fix="read it with the release that wrote it",
        )
    if DIGESTS not in data:
        if verify:
            logger.warning(
                "%s holds no digests, as releases 0.1 and 0.2 wrote none: damage may go unnoticed. Save it again.",
                where,
            )
        return RecordFile(dict(data), None, where)
    rest = {key: value for key, value in data.items() if key != DIGESTS}
    if not verify:
        return RecordFile(rest, None, where)
    digests = data[DIGESTS]
    plain = isinstance(digests, dict) and all(isinstance(value, str) for value in digests.values())
    tensors = {name: value for name, value in digests.items() if name != RECORD} if plain else {}
    expected, found = (digests.get(RECORD) if plain else None), record_digest(rest, tensors)
    if expected != found:
        raise ArtifactError(
            "a record was changed since it was saved",
            expected=f"digest {str(expected)[:40]}",
            got=f"digest {found}",
            where=where,
            fix='restore the file; if you changed it on purpose, remove its entry "digests" or pass verify=False',
        )
    return RecordFile(rest, tensors, where, found)


def record_digest(data: Any, tensors: Mapping[str, str] | None = None) -> str:
    """A digest of plain data, which depends neither on the order of keys nor on spaces in a file.

    Args:
        data: whatever JSON can hold.
        tensors: digests of the files beside it, by name.
    """
    text = json.dumps([data, dict(tensors or {})], sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# -- tensors -----------------------------------------------------------------------------------------------------------


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> str:
    """Write tensors and metadata to a safetensors file.

    Returns:
        The digest of the tensors, for the record beside the file.

    Raises:
        FileAccessError: the file system refuses.
    """
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with file_errors("write the file", path):
        Path(path).touch()
        mode = Path(path).stat().st_mode
        save_file(plain, path, metadata=dict(metadata))
        Path(path).chmod(mode)  # safetensors writes files that their owner alone can read
    return tensors_digest(plain)


def read_tensors(
    path: str | Path,
    expected: Mapping[str, tuple[int, ...]],
    *,
    digest: str | None,
    allow_nonfinite: bool = False,
) -> dict[str, Tensor]:
    """Read the tensors `expected` (shapes by name), all fp32 or all bf16. The file is checked before it is read.

    Args:
        path: the file.
        expected: shapes by name.
        digest: of the tensors; None does not check it.
        allow_nonfinite: also read infinities and NaN.

    Raises:
        ArtifactError: the file is missing, truncated, foreign or damaged; names, shapes or dtypes differ; or a value is
            not finite.
    """
    with opened(path) as file:
        names = set(file.keys())
        missing, extra = sorted(expected.keys() - names), sorted(names - expected.keys())
        if missing or extra:
            raise ArtifactError(
                "this file is not the one that belongs to the record beside it",
                expected=f"{len(expected)} tensors" + (f", {listed(missing)} among them" if missing else ""),
                got=f"{len(names)} tensors" + (f", {listed(extra)} among them" if extra else ""),
                where=path,
                fix="keep the files of one artefact together, as they were saved",
            )
        slices = {name: file.get_slice(name) for name in expected}
        types = {piece.get_dtype() for piece in slices.values()}
        if len(types) > 1 or not types <= DTYPES.keys():
            raise ArtifactError(
                "weights of an unexpected type",
                expected=f"all of one type among {', '.join(DTYPES)}",
                got=", ".join(sorted(types)),
                where=path,
                fix="save the adapters again",
            )
        for name, piece in slices.items():
            if tuple(piece.get_shape()) != tuple(expected[name]):
                raise ArtifactError(
                    "a weight has another shape than the model and the structure say",
                    expected=tuple(expected[name]),
                    got=tuple(piece.get_shape()),
                    where=f"{name} in {path}",
                    fix="keep an artefact's files together; build the model with the same tasks and classes",
                )
        return _read(file, list(expected), path, digest=digest, finite=not allow_nonfinite)


def read_all(path: str | Path, *, digest: str | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file, in its stored dtype, and the file's metadata.

    Args:
        path: the file.
        digest: of the tensors; None does not check it.

    Raises:
        ArtifactError: the file is missing, truncated, damaged or not a safetensors file.
    """
    with opened(path) as file:
        return _read(file, list(file.keys()), path, digest=digest, finite=False), file.metadata() or {}


def read_bytes(path: str | Path, expected: Mapping[str, int], *, digest: str | None) -> dict[str, Tensor]:
    """Read the uint8 vectors `expected` (lengths by name). The file is checked before it is read.

    Args:
        path: the file.
        expected: lengths by name.
        digest: of the vectors; None does not check it.

    Raises:
        ArtifactError: the file is missing, truncated, foreign or damaged; or names, lengths or dtypes differ.
    """
    with opened(path) as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        described = {name: (piece.get_dtype(), *piece.get_shape()) for name, piece in found.items()}
        wanted = {name: ("U8", length) for name, length in expected.items()}
        wrong = [name for name in sorted(wanted.keys() | described.keys()) if wanted.get(name) != described.get(name)]
        if wrong:
            raise ArtifactError(
                "this file is not the one that belongs to the record beside it",
                expected=f"{wrong[0]} {wanted.get(wrong[0], 'absent')}",
                got=described.get(wrong[0], "absent"),
                where=path,
                fix="keep the files of one artefact together, as they were saved",
            )
        return _read(file, list(expected), path, digest=digest, finite=False)


def check_tensors(path: str | Path, digest: str | None) -> list[str]:
    """Check the tensors of a file one after the other; one of them is in memory at a time.

    Args:
        path: the file.
        digest: of the tensors; None checks the header alone.

    Returns:
        The names of the tensors.

    Raises:
        ArtifactError: the file is missing, truncated, damaged or not a safetensors file.
    """
    with opened(path) as file:
        names = list(file.keys())
        if digest is not None:
            _check_digest(digest, *_checksums(file, names), path)
        return names


def file_digest(path: str | Path) -> str:
    """The digest of the tensors in a file, of which one is in memory at a time."""
    with opened(path) as file:
        return _combined(*_checksums(file, list(file.keys())))


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        ArtifactError: the file is missing, truncated or foreign, or a link to elsewhere.
    """
    path = Path(path)
    check_inside(path)
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            "the weights cannot be read",
            expected="a whole safetensors file",
            got=_nature(path, error),
            where=path,
            fix="copy or save it again; pickled files are never opened",
        ) from error


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of names, types, shapes and bits, which does not depend on the order."""
    return _combined(tensors, {name: _checksum(value) for name, value in tensors.items()})


def check_finite(tensors: Mapping[str, Tensor], *, where: object, fix: str) -> None:
    """Check that all values are finite.

    Raises:
        ArtifactError: naming the tensors that hold others.
    """
    broken = _broken(tensors)
    if broken:
        raise _not_finite(broken, where, fix)


def _broken(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold infinities or NaN."""
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    sums = [value.sum(dtype=torch.float32) for value in floats.values()]
    if not sums or bool(torch.isfinite(torch.stack(sums)).all()):  # true of most, and faster than one by one
        return []
    return [name for name, value in floats.items() if not is_finite(value)]


def is_finite(value: Tensor) -> bool:
    """Whether all values of a tensor are finite."""
    if not value.is_floating_point():
        return True
    if bool(torch.isfinite(value.sum(dtype=torch.float32))):  # a fortieth of the time; true of most
        return True
    return bool(torch.isfinite(value).all())


# -- links and special files -------------------------------------------------------------------------------------------


def check_inside(path: Path) -> None:
    """Check that a file of an artefact is not a link out of its folder, and neither a device nor a pipe.

    The cache of the Hugging Face Hub is an exception: there, files are links into the folder `blobs` of the same
    repository.

    Raises:
        ArtifactError: it is one of these.
    """
    try:
        status = path.stat()
    except OSError:
        return  # missing: whoever opens it says so
    if path.is_symlink():
        home, target = path.parent.resolve(), path.resolve()
        if not target.is_relative_to(home) and target.parent not in _blobs(home):
            raise ArtifactError(
                "a file of an artefact is a link out of its folder",
                expected="a file",
                got=f"a link to {target}",
                where=path,
                fix="copy the file itself, if you trust it",
            )
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(
            "this is no regular file",
            expected="a file",
            got="a folder" if stat.S_ISDIR(status.st_mode) else "a device, a pipe or a socket",
            where=path,
            fix="restore the folder as it was saved",
        )


def _blobs(home: Path) -> list[Path]:
    """Where the files of a folder in the hub's cache lie: REPOSITORY/blobs for REPOSITORY/snapshots/REVISION/..."""
    return [place.parent / "blobs" for place in home.parents if place.name == "snapshots"]


# -- inside ------------------------------------------------------------------------------------------------------------


def _read(file: Any, names: list[str], path: str | Path, *, digest: str | None, finite: bool) -> dict[str, Tensor]:
    """Read tensors, and meanwhile check those that are already in memory.

    Reading mostly waits for memory, so on a second core the checks take almost no time.
    """
    tensors: dict[str, Tensor] = {}
    checks: list[Future[tuple[dict[str, int], list[str]]]] = []
    part: dict[str, Tensor] = {}
    size = 0  # bytes of `part`

    def check(part: dict[str, Tensor]) -> tuple[dict[str, int], list[str]]:
        sums = {} if digest is None else {name: _checksum(value) for name, value in part.items()}
        return sums, _broken(part) if finite else []

    # A hundred small tensors are read together in a third of the time.
    at_once = load(Path(path).read_bytes()) if os.path.getsize(path) <= _PART else {}
    with ThreadPoolExecutor(1) as beside:
        for name in names:
            # Without the clone it would stay mapped to the file.
            part[name] = tensors[name] = at_once[name] if name in at_once else file.get_tensor(name).clone()
            size += part[name].nbytes
            if size >= _PART:
                checks.append(beside.submit(check, part))
                part, size = {}, 0
        checksums, broken = check(part)
        for found in checks:
            checksums |= found.result()[0]
            broken += found.result()[1]
    if digest is not None:
        _check_digest(digest, tensors, checksums, path)
    if broken:
        fix = "train again with a lower rate, or read it as it is with allow_nonfinite=True"
        raise _not_finite(broken, path, fix)
    return tensors


def _check_digest(digest: str, tensors: Mapping[str, Tensor], checksums: Mapping[str, int], path: str | Path) -> None:
    if not digest.startswith(f"{_ALGORITHM}:"):
        raise ArtifactError(
            "the digest of this file is of an unknown kind",
            expected=f"{_ALGORITHM}:...",
            got=digest[:40],
            where=path,
            fix="read it with the release that wrote it, or without a check: verify=False",
        )
    found = _combined(tensors, checksums)
    if found != digest:
        raise ArtifactError(
            "the tensors of a file were changed since it was saved",
            expected=f"digest {digest[:40]}",
            got=f"digest {found}",
            where=path,
            fix="copy the file again from where it is whole; verify=False reads it as it is",
        )


def _checksum(value: Tensor) -> int:
    """The CRC-32 of the sums of each 512 bytes, read as 64 numbers of 64 bits, and of the bytes that are left over.

    It reads 25 GB/s where SHA-256 reaches 2 and CRC-32 alone 7. It misses what leaves all sums equal: an exchange of
    numbers within 512 bytes, and by chance one change in 2**32.
    """
    flat = value.detach().cpu().contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8 or flat.stride() != (1,):
        flat = flat.clone(memory_format=torch.contiguous_format)
    raw, rest = flat.view(torch.uint8), b""
    left_over = raw.numel() % _BLOCK
    if left_over:
        raw, rest = raw[:-left_over], raw[-left_over:].numpy().tobytes()
    sums: Any = raw.view(torch.int64).view(-1, _BLOCK // 8).sum(1).numpy()
    return zlib.crc32(rest, zlib.crc32(sums))


def _checksums(file: Any, names: list[str]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors without values, and checksums of the values."""
    like, checksums = {}, {}
    for name in names:
        value = file.get_tensor(name)
        like[name], checksums[name] = value.to("meta"), _checksum(value)
    return like, checksums


def _combined(tensors: Mapping[str, Tensor], checksums: Mapping[str, int]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        value = tensors[name]
        found.update(f'[{json.dumps(name)}, "{value.dtype}", {list(value.shape)}, {checksums[name]}]'.encode())
    return f"{_ALGORITHM}:{found.hexdigest()}"


def _not_finite(names: list[str], where: object, fix: str) -> ArtifactError:
    return ArtifactError(
        "weights that are not finite",
        expected="finite values",
        got=f"inf or nan in {listed(names)}",
        where=where,
        fix=fix,
    )


def _check_header(path: Path) -> None:
    """Refuse a safetensors file whose header takes too much memory to parse."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MOST_HEADER_BYTES < length <= os.path.getsize(path):
        raise SafetensorError(f"a header of {length:,} bytes; at most {MOST_HEADER_BYTES:,} are read")


def _nature(path: Path, error: Exception) -> str:
    """Describe a file that cannot be read as safetensors, from its first bytes."""
    if not path.is_file():
        return "no such file"
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as refused:
        return refused.strerror or str(refused)
    size = f"{path.stat().st_size:,} bytes"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return f"a pickled file ({size})"
    return f"{size} that are truncated or foreign ({error})"
