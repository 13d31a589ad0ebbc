"""Storages of studies: a journal file, a database, or a proxy of one."""

from __future__ import annotations

import errno
import functools
import importlib.util
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import grpc
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from gatedadapters.errors import GatedAdaptersError, StudyError
from gatedadapters.redaction import remember
from gatedadapters.safe_files import file_error, file_errors

GRPC, SQLITE, POSTGRES = "grpc://", "sqlite", "postgresql://"
_WAIT = 10  # seconds that a proxy has to answer
_FAILURES = (SQLAlchemyError, StorageInternalError, grpc.RpcError, json.JSONDecodeError, OSError)
Method = TypeVar("Method", bound=Callable[..., Any])


def told_of_storage(method: Method) -> Method:
    """A decorator of the methods of a study: a storage that fails is a StudyError without the storage's password.

    What the storage raised is not chained to it, because it may show the whole address.
    """

    @functools.wraps(method)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except GatedAdaptersError:
            raise
        except _FAILURES as error:
            raise _storage_error(error, str(self.storage)) from None

    return told  # type: ignore[return-value]


def _storage_error(error: Exception, where: str) -> GatedAdaptersError:
    if isinstance(error, OSError) and error.errno in errno.errorcode and "://" not in where:
        return file_error(error, "use the storage of the study", where)
    return StudyError(
        "the storage of the study fails",
        expected="a storage that can be read and written",
        got=f"{type(error).__name__}: {_first_line(error)}",
        where=f"storage {where}",
        fix="check the server, the network and the rights; then run the study again: it goes on where it stopped",
    )


def check_workers(where: object, workers: int) -> None:
    """Check that a storage supports this many processes.

    Raises:
        StudyError: several workers with SQLite, or with a storage object that other processes cannot open.
    """
    if workers > 1 and isinstance(where, BaseStorage):
        raise StudyError(
            "several workers need a storage that they can all open",
            expected="a file name or a URL",
            got=type(where).__name__,
            where="storage",
            fix="give the name of a journal file",
        )
    if workers > 1 and str(where).startswith(SQLITE):
        raise StudyError(
            "SQLite locks up under several workers",
            expected="a journal file, or the URL of a database server",
            got=f"{where} with {workers} workers",
            where="storage",
            fix="give a file name ending in .journal",
        )


def open_storage(where: str | Path, *, create: bool = True) -> BaseStorage:
    """Open a storage by its file name or URL.

    Args:
        where: the file of a journal, `grpc://HOST:PORT` (a proxy, started with
            `optuna.storages.run_grpc_proxy_server`), or a URL that Optuna accepts: `postgresql://...`, `mysql://...`.
        create: make the journal if the file does not exist.

    Raises:
        StudyError: the storage cannot be reached or used.
    """
    text = str(where)
    remember(text)
    try:
        if text.startswith(GRPC):
            return _proxy(text)
        if "://" in text:
            return _database(text)
        return _journal(Path(text), create)
    except GatedAdaptersError:
        raise
    except Exception as error:  # every back end and driver raises its own kinds of error
        raise StudyError(
            "the storage cannot be reached",
            expected="a file, grpc://localhost:13000, or the URL of a database",
            got=f"{type(error).__name__}: {_first_line(error)}",
            where=f"storage {text}",
            fix="check the address, the server, and that its driver is installed (gatedadapters[postgresql])",
        ) from None  # what the back end raised may show the whole address


def _journal(path: Path, create: bool) -> BaseStorage:
    if not path.parent.is_dir():
        raise StudyError(
            "the storage cannot be reached",
            expected="a file in a folder that exists",
            got="no such folder",
            where=f"storage {path}",
            fix="make the folder, or give another file",
        )
    if not create and not path.is_file():
        raise StudyError(
            "there is no such storage",
            expected="the journal of a study that was run",
            got="no such file",
            where=f"storage {path}",
            fix="name the storage it was run with, or run it first",
        )
    if path.is_file() and path.stat().st_size:
        with file_errors("use the storage of the study", path), path.open("rb") as file:
            start = file.read(1)
        if start != b"{":
            raise StudyError(
                "this file is no journal",
                expected="one JSON object a line",
                got=f"a file that starts with {start!r}",
                where=f"storage {path}",
                fix="give another file; a database is named by a URL",
            )
    try:
        return JournalStorage(_Journal(str(path)))
    except OSError as error:
        raise file_error(error, "use the storage of the study", path) from error


class _Journal(JournalFileBackend):
    """Optuna's journal file, which keeps its form where a line was written in part: the disk was full, or the power
    failed. Optuna would go on behind that part, and then read nothing of the study any more.
    """

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append whole lines, or none."""
        text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs)
        self._lock.acquire()
        try:
            with open(self._file_path, "r+b") as file:
                end = _end_of_whole_lines(file)
                file.truncate(end)
                file.seek(end)
                try:
                    file.write(text.encode())
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self._file_path, end)
                    raise
        finally:
            self._lock.release()


def _end_of_whole_lines(file: BinaryIO) -> int:
    """Position after the last end of a line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _database(url: str) -> BaseStorage:
    if url.startswith(SQLITE):
        return RDBStorage(url)
    # Trials take minutes. A connection kept open between two writes would occupy the server, and many servers cut it.
    return RDBStorage(_with_driver(url), engine_kwargs={"poolclass": NullPool})


def _proxy(text: str) -> BaseStorage:
    host, _, port = text.removeprefix(GRPC).rstrip("/").rpartition(":")
    if not host or not port.isdigit():
        expected = "grpc:// with a host and its port, as in grpc://localhost:13000"
        raise StudyError(expected=expected, got=text, where="storage", fix="name both")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna may still change how a proxy is made
        proxy = GrpcStorageProxy(host=host, port=int(port))
    proxy.wait_server_ready(timeout=_WAIT)
    return proxy


def _with_driver(url: str) -> str:
    """The URL with the driver psycopg 3, if it names no driver and SQLAlchemy's default, psycopg2, is not installed."""
    if url.startswith(POSTGRES) and importlib.util.find_spec("psycopg2") is None:
        return url.replace(POSTGRES, "postgresql+psycopg://", 1)
    return url


def _first_line(error: BaseException) -> str:
    cause: Any = error.__cause__ or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else ""
