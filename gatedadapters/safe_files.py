"""Writes folders whole or not at all, and reads tensors without running code from a file."""

from __future__ import annotations

import ctypes
import os
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

from gatedadapters.errors import ArtifactError

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


@contextmanager
def whole_folder(
    folder: str | Path, *, files: Collection[str], overwrite: bool = False, beside: str | None = None
) -> Iterator[Path]:
    """Yield a new folder to write into. It becomes `folder` when the block ends, and is deleted if the block fails.

    The new folder is a hidden sibling of `folder`. Once all its files have reached the disk, one rename gives it its
    name. With `overwrite` the old and the new folder exchange their names in one step. A system without such an
    exchange takes several renames; an interruption between them leaves the old folder whole under a hidden name, see
    `leftovers`.

    Args:
        folder: the folder to write. Its parents are made. If it is a link, the target of the link is written.
        files: names of the files that an artefact of this kind holds. Other files are the user's and never replaced.
        overwrite: replace an earlier artefact.
        beside: write into a folder that may hold other files, which stay; an earlier artefact is replaced. Files then
            move one by one, so this names the file by which an artefact is recognised. It is taken away first and comes
            last: an interruption leaves no artefact, never a mixed one.

    Raises:
        ArtifactError: `folder` is a file, holds other files, or holds an artefact and `overwrite` is False.
    """
    target = Path(folder).resolve()  # a rename would replace a link by a folder
    if beside is None or not target.is_dir():
        check_free(target, files, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    scratch.mkdir()
    try:
        yield scratch
        for path in [*scratch.rglob("*"), scratch]:
            _flush(path)
        if beside is not None and target.is_dir():
            (target / beside).unlink(missing_ok=True)
            for path in sorted(scratch.iterdir(), key=lambda path: path.name == beside):
                os.replace(path, target / path.name)
            return
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
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    part.write_text(text, encoding="utf-8")
    os.replace(part, target)


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata to a safetensors file."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
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
