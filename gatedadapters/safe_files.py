"""Writes files and folders whole or not at all, and says in plain words what the file system refuses."""

from __future__ import annotations

import ctypes
import errno
import filecmp
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gatedadapters.errors import ArtifactError, FileAccessError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TEMPORARY = ".tmp"  # how files begin that safetensors is writing
_HELD: set[int] = set()  # handles of the locks of this process
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

_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error", "file write failed")  # it names no number


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
        fix=_REMEDIES.get(error.errno or 0, "check the path, the disk and the network"),
    )
    told.errno, told.strerror, told.filename = error.errno, error.strerror, str(place)
    return told


def _code_of_writer(error: Exception) -> int | None:
    """The system's error number behind an error of safetensors' or torch's writer; None for any other error."""
    text = str(error)
    found = re.search(r"\(os error (\d+)\)", text)
    if found is not None:
        return int(found[1])
    return errno.ENOSPC if any(part in text for part in _TORCH_WRITER) else None


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


def check_writable(folder: str | Path) -> None:
    """Check that `folder` can be written, or made, before anything is computed for it.

    Raises:
        FileAccessError: the file system refuses, or says that it would.
    """
    with file_errors("write the folder", folder):
        place = Path(folder).resolve()
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        probe = place / f".{secrets.token_hex(4)}"  # rights do not tell of full or read-only disks
        try:
            probe.write_bytes(b"?")
        finally:
            probe.unlink(missing_ok=True)


@contextmanager
def whole_folder(
    folder: str | Path,
    *,
    files: Collection[str],
    overwrite: bool = False,
    beside: str | None = None,
    together: bool = False,
) -> Iterator[Path]:
    """Yield a new folder to write into. It becomes `folder` when the block ends, and is deleted if the block fails.

    The new folder is a hidden sibling of `folder`. Once all its files have reached the disk, one rename gives it its
    name. With `overwrite` the old and the new folder exchange their names in one step. A system without such an
    exchange takes several renames; an interruption between them leaves the old folder whole under a hidden name, see
    `leftovers`. At the end, what killed processes left of the same folder is removed.

    Args:
        folder: the folder to write. Its parents are made. If it is a link, the target of the link is written.
        files: names of the files that an artefact of this kind holds. Other files are the user's and never replaced.
        overwrite: replace an earlier artefact.
        beside: write into a folder that may hold other files, which stay; an earlier artefact is replaced. Files then
            move one by one, so this names the file by which an artefact is recognised. It is taken away first and comes
            last: an interruption leaves no artefact, never a mixed one.
        together: other processes write the same at the same time, as those of a DistributedDataParallel training do if
            each of them saves. A folder that holds the very same files is left as it is.

    Raises:
        ArtifactError: `folder` is a file, holds other files, or holds an artefact and `overwrite` is False; or another
            process writes it at the same time.
        FileAccessError: the file system refuses.
    """
    with file_errors("write the folder", folder):
        target = Path(folder).resolve()  # a rename would replace a link by a folder
        if not together and (beside is None or not target.is_dir()):
            check_free(target, files, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        before = _identity(target)
        scratch, lock = _hidden_folder(target)
        try:
            yield scratch
            for path in [*scratch.rglob("*"), scratch]:
                _flush(path)
            if beside is not None and target.is_dir():
                (target / beside).unlink(missing_ok=True)
                for path in sorted(scratch.iterdir(), key=lambda path: path.name == beside):
                    os.replace(path, target / path.name)
            elif not (together and _same_files(scratch, target)):
                try:
                    check_free(target, files, overwrite)  # another process may have written it meanwhile
                    _replace(target, scratch, before)
                except ArtifactError:
                    if not (together and _same_files(scratch, target)):
                        raise
                _flush(target.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)  # the unfinished folder, or the one that was replaced
            _release(lock)
        remove_leftovers(target, files)


def leftovers(path: str | Path) -> list[Path]:
    """Whole or unfinished files or folders beside `path` that calls of `write_text` or `whole_folder` are writing, or
    left when they were killed.
    """
    target = Path(path).resolve()
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}")
    if not target.parent.is_dir():
        return []
    return sorted(other for other in target.parent.iterdir() if pattern.fullmatch(other.name))


def remove_leftovers(path: str | Path, files: Collection[str] = ()) -> None:
    """Remove the `leftovers` of processes that are dead; never those of a process that lives.

    Args:
        path: a file that `write_text` writes, or a folder that `whole_folder` writes.
        files: names of the files that such a folder holds. A hidden folder with others is not ours, and stays.
    """
    for left in leftovers(path):
        try:
            lock = _lock(left)
        except OSError:  # its process lives, or it is gone already
            continue
        if lock is None:  # this system cannot tell
            continue
        try:
            if left.is_file():
                left.unlink(missing_ok=True)
            elif all(held.name in files or held.name.startswith(_TEMPORARY) for held in left.iterdir()):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            _release(lock)


@contextmanager
def sole_user(folder: Path, *, what: str) -> Iterator[None]:
    """A context in which no other process, and no other thread, enters such a context with the same folder.

    The system ends it with the process, however the process ends. Systems without such locks let everybody in.

    Args:
        folder: an existing folder.
        what: what the folder holds, for the error: "stream".

    Raises:
        ArtifactError: another process is in such a context.
        FileAccessError: the file system refuses.
    """
    with file_errors(f"use the folder of the {what}", folder):
        try:
            lock = _lock(folder.resolve())
        except BlockingIOError:
            raise ArtifactError(
                f"another process is writing this {what}",
                expected=f"one process for each {what}",
                got="a folder that is in use",
                where=folder,
                fix="wait until it has ended, or give another folder",
            ) from None
    try:
        yield
    finally:
        _release(lock)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file that appears whole or not at all; its folder is made.

    A process that is killed meanwhile leaves a hidden sibling, which the next call for the same file removes.

    Raises:
        FileAccessError: the file system refuses.
    """
    target = Path(path)
    with file_errors("write the file", target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part, lock = _hidden_file(target)
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)
            _release(lock)
        remove_leftovers(target)


def check_free(target: Path, files: Collection[str], overwrite: bool) -> None:
    """Check that `whole_folder` may write a folder; for its arguments and errors see there."""
    if target.is_dir():
        held = sorted(path.name for path in target.iterdir())
        foreign = [name for name in held if name not in files]
        if foreign:
            raise ArtifactError(
                "the folder holds files that do not belong to an artefact",
                expected="a new folder, an empty one, or an artefact to overwrite",
                got=listed(foreign),
                where=target,
                fix="give a folder of its own",
            )
        if held and not overwrite:
            raise ArtifactError(
                "the folder already holds an artefact",
                expected="a new or an empty folder",
                got=listed(held),
                where=target,
                fix="give another folder, or overwrite it: overwrite=True, on the command line --overwrite",
            )
    elif target.exists():
        raise ArtifactError(
            "a file is in the way", expected="a folder", got="a file", where=target, fix="give another name"
        )


def _replace(target: Path, new: Path, before: tuple[int, int] | None) -> None:
    """Give the folder `new` the name `target`, if `target` is as it was `before`; else leave both as they are.

    Raises:
        ArtifactError: another process has written it meanwhile.
    """
    meanwhile = ArtifactError(
        "another process has written this folder meanwhile",
        expected="one process at a time",
        got="another folder of this name, which stays",
        where=target,
        fix="look at what the other process wrote; then give another folder, or write again",
    )
    if not target.exists() or not any(target.iterdir()):
        try:
            os.rename(new, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise meanwhile from None
            raise
        return
    _exchange(new, target)
    if _identity(new) != before:  # looked at after the exchange, which nobody can come between
        _exchange(new, target)
        raise meanwhile


def _same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold files of the same names and bytes, and nothing else."""
    names = [path.name for path in one.iterdir()]
    if not other.is_dir() or {path.name for path in other.iterdir()} != set(names):
        return False
    return not any(filecmp.cmpfiles(one, other, names, shallow=False)[1:])


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one of its name; None if it does not exist."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _exchange(one: Path, other: Path) -> None:
    """Exchange the names of two folders."""
    names = os.fsencode(one), os.fsencode(other)
    if os.name == "posix":
        library = ctypes.CDLL(None)
        if hasattr(library, "renameat2") and not library.renameat2(-100, names[0], -100, names[1], 2):
            return  # Linux: AT_FDCWD, RENAME_EXCHANGE
        if hasattr(library, "renamex_np") and not library.renamex_np(*names, 2):
            return  # macOS: RENAME_SWAP
    lock = _lock(other)  # of the folder, whatever its name is
    aside = other.with_name(f".{other.name}.{secrets.token_hex(4)}")
    try:
        os.rename(other, aside)
        os.rename(one, other)
        os.rename(aside, one)
    finally:
        _release(lock)


def _hidden_folder(target: Path) -> tuple[Path, int | None]:
    """A new hidden folder beside `target`, and the lock that says that its process lives."""
    while True:
        hidden = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        hidden.mkdir()
        lock = _lock_own(hidden)
        if lock != -1:
            return hidden, lock


def _hidden_file(target: Path) -> tuple[Path, int | None]:
    """The same for a file."""
    while True:
        hidden = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        hidden.touch(exist_ok=False)
        lock = _lock_own(hidden)
        if lock != -1:
            return hidden, lock


def _lock_own(hidden: Path) -> int | None:
    """Lock what was just made; -1 if another process took it for a leftover in between."""
    try:
        lock = _lock(hidden)
    except (BlockingIOError, FileNotFoundError):
        return -1
    if not hidden.exists():
        _release(lock)
        return -1
    return lock


def _lock(path: Path) -> int | None:
    """Lock a file or folder for this process. The lock ends with the process at the latest.

    Returns:
        A handle for `_release`; None on a system or a disk without such locks.

    Raises:
        BlockingIOError: another process holds it, or another thread of this one.
        OSError: there is no such file, or it may not be opened.
    """
    if fcntl is None:
        return None
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a network disk, for example
        os.close(handle)
        return None
    _HELD.add(handle)
    return handle


def _release(lock: int | None) -> None:
    if lock in _HELD:
        _HELD.discard(lock)
        os.close(lock)


def _release_in_child() -> None:
    """A forked process, such as the worker of a data loader, must not keep the locks of a parent that was killed."""
    for lock in tuple(_HELD):
        _release(lock)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)


def _flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, has reached the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def listed(names: Collection[str], limit: int = 3) -> str:
    """The first few names, for an error."""
    return ", ".join([*list(names)[:limit], *(["..."] if len(names) > limit else [])])
