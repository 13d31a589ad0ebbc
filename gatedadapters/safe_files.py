"""Writes folders whole or not at all, and reads tensors without running code from a file."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gatedadapters.errors import ArtifactError, FileAccessError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_REMEDIES = {
    errno.ENOSPC: "free some space, or give a folder on another disk",
    errno.EDQUOT: "free some space of your quota, or give a folder on another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or give a folder on another disk",
    errno.EACCES: "give a place that you may use, or change its rights (ls -l shows them)",
    errno.EPERM: "give a place that you may use, or change its rights (ls -l shows them)",
    errno.EROFS: "give a folder on a disk that is not read-only",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path: a part of it is a file",
    errno.EISDIR: "name a file: this is a folder",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "remove the link that leads to itself",
    errno.EMFILE: "close other files, or raise the limit (ulimit -n)",
    errno.EIO: "check the disk, or give a folder on another one",
}


@contextmanager
def file_errors(doing: str, where: str | Path) -> Iterator[None]:
    """A context in which what the file system refuses becomes a `FileAccessError` that says what to do.

    Args:
        doing: what is done there, to complete "cannot": "write the results".
        where: the file or folder, for errors that name none.

    Raises:
        FileAccessError: instead of an `OSError`, or of an error of safetensors' or torch's writer.
    """
    try:
        yield
    except FileAccessError:
        raise
    except OSError as error:
        raise file_error(error, doing, where) from error
    except (SafetensorError, RuntimeError) as error:
        code = _code_of_writer(error)
        if code is None:
            raise
        raise file_error(OSError(code, os.strerror(code)), doing, where) from error


def file_error(error: OSError, doing: str, where: str | Path) -> FileAccessError:
    """What to tell of an error of the file system; see `file_errors`."""
    place = error.filename if isinstance(error.filename, str | os.PathLike) else where
    told = FileAccessError(
        f"cannot {doing}",
        got=error.strerror or str(error) or type(error).__name__,
        where=place,
        fix=_REMEDIES.get(error.errno or 0, "check the disk and the path"),
    )
    told.errno, told.strerror, told.filename = error.errno, error.strerror, str(place)
    return told


def _code_of_writer(error: Exception) -> int | None:
    """The system's error number behind an error of safetensors' or torch's writer; None for any other error."""
    text = str(error)
    found = re.search(r"\(os error (\d+)\)", text)
    if found is not None:
        return int(found[1])
    return errno.ENOSPC if "PytorchStreamWriter" in text or "file write failed" in text else None


def read_text(path: str | Path, *, most: int | None = None) -> str:
    """The text of a file.

    Args:
        path: a file; what is none (a device, a pipe) is not opened, because it may never end.
        most: bytes that it may have.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no file, too long, or no UTF-8.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError("a folder" if path.is_dir() else "no regular file")
    with path.open("rb") as file:
        data = file.read() if most is None else file.read(most + 1)
    if most is not None and len(data) > most:
        raise ValueError(f"more than {most:,} bytes")
    return data.decode("utf-8")


@contextmanager
def whole_folder(folder: str | Path, *, files: Collection[str], overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder to write into. It becomes `folder` when the block ends, and is deleted if the block fails.

    The new folder is a hidden sibling of `folder`. Once all its files have reached the disk, one rename gives it its
    name. With `overwrite` the old and the new folder exchange their names in one step. A system without such an
    exchange takes several renames; an interruption between them leaves the old folder whole under a hidden name, see
    `leftovers`.

    Args:
        folder: the folder to write. Its parents are made. If it is a link, the target of the link is written.
        files: names of the files that an artefact of this kind holds. Other files are the user's and never replaced.
        overwrite: replace an earlier artefact.

    Raises:
        ArtifactError: `folder` is a file, holds other files, or holds an artefact and `overwrite` is False.
        FileAccessError: the file system refuses.
    """
    with file_errors("write the folder", folder):
        target = Path(folder).resolve()  # a rename would replace a link by a folder
        check_free(target, files, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        scratch.mkdir()
        try:
            yield scratch
            for path in [*scratch.rglob("*"), scratch]:
                _flush(path)
            check_free(target, files, overwrite)  # another process may have written it meanwhile
            if target.exists() and any(target.iterdir()):
                _exchange(scratch, target)
            else:
                os.rename(scratch, target)
            _flush(target.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # the unfinished folder, or the one that was replaced


def leftovers(folder: str | Path) -> list[Path]:
    """Whole or unfinished folders beside `folder`, left by interrupted calls of `whole_folder`."""
    target = Path(folder).resolve()
    return sorted(target.parent.glob(f".{target.name}.????????")) if target.parent.is_dir() else []


def write_text(path: str | Path, text: str) -> None:
    """Write a text file that appears whole or not at all; its folder is made.

    A process that is killed meanwhile leaves a hidden sibling `.NAME.*`.

    Raises:
        FileAccessError: the file system refuses.
    """
    target = Path(path)
    with file_errors("write the file", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to a safetensors file.

    Raises:
        FileAccessError: the file system refuses.
    """
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with file_errors("write the file", path):
        save_file(plain, path, metadata=dict(metadata))


def read_tensors(path: str | Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Read the tensors `expected` (shapes by name), all fp32 or all bf16. The file is checked before it is read.

    Raises:
        ArtifactError: the file is missing, truncated or foreign; or names, shapes or dtypes differ.
    """
    with opened(path) as file:
        names = set(file.keys())
        missing, extra = sorted(expected.keys() - names), sorted(names - expected.keys())
        if missing or extra:
            raise ArtifactError(
                "this file is not the one that belongs to the record beside it",
                expected=f"{len(expected)} tensors" + (f", {_some(missing)} among them" if missing else ""),
                got=f"{len(names)} tensors" + (f", {_some(extra)} among them" if extra else ""),
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
        return {
            name: file.get_tensor(name).clone() for name in expected
        }  # without a copy they would stay mapped to the file


def read_all(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of a safetensors file that another program wrote, in its stored dtype, and the file's metadata.

    Raises:
        ArtifactError: the file is missing, truncated or not a safetensors file.
    """
    with opened(path) as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def read_bytes(path: str | Path, expected: Mapping[str, int]) -> dict[str, Tensor]:
    """Read the uint8 vectors `expected` (lengths by name). The file is checked before it is read.

    Raises:
        ArtifactError: the file is missing, truncated or foreign; or names, lengths or dtypes differ.
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
        return {name: file.get_tensor(name).clone() for name in expected}


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        ArtifactError: the file is missing, truncated or foreign.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            "the weights cannot be read",
            expected="a whole safetensors file",
            got=_nature(Path(path), error),
            where=path,
            fix="copy or save it again; pickled files are never opened",
        ) from error


def check_free(target: Path, files: Collection[str], overwrite: bool) -> None:
    """Check that `whole_folder` may write a folder; for its arguments and errors see there."""
    if target.is_dir():
        held = sorted(path.name for path in target.iterdir())
        foreign = [name for name in held if name not in files]
        if foreign:
            raise ArtifactError(
                "the folder holds files that do not belong to an artefact",
                expected="a new folder, an empty one, or an artefact to overwrite",
                got=_some(foreign),
                where=target,
                fix="give a folder of its own",
            )
        if held and not overwrite:
            raise ArtifactError(
                "the folder already holds an artefact",
                expected="a new or an empty folder",
                got=_some(held),
                where=target,
                fix="give another folder, or overwrite=True",
            )
    elif target.exists():
        raise ArtifactError(
            "a file is in the way", expected="a folder", got="a file", where=target, fix="give another name"
        )


def _exchange(one: Path, other: Path) -> None:
    """Exchange the names of two folders."""
    names = os.fsencode(one), os.fsencode(other)
    if os.name == "posix":
        library = ctypes.CDLL(None)
        if hasattr(library, "renameat2") and not library.renameat2(-100, names[0], -100, names[1], 2):
            return  # Linux: AT_FDCWD, RENAME_EXCHANGE
        if hasattr(library, "renamex_np") and not library.renamex_np(*names, 2):
            return  # macOS: RENAME_SWAP
    aside = other.with_name(f".{other.name}.{secrets.token_hex(4)}")
    os.rename(other, aside)
    os.rename(one, other)
    os.rename(aside, one)


def _flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, has reached the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _nature(path: Path, error: Exception) -> str:
    """Describe a file that cannot be read as safetensors, from its first bytes."""
    if not path.is_file():
        return "no such file"
    with path.open("rb") as file:
        start = file.read(4)
    size = f"{path.stat().st_size:,} bytes"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return f"a pickled file ({size})"
    return f"{size} that are truncated or foreign ({error})"


def _some(names: Collection[str], limit: int = 3) -> str:
    """The first few names, for an error."""
    return ", ".join([*list(names)[:limit], *(["..."] if len(names) > limit else [])])
