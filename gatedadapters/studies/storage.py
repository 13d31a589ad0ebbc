"""Storages of studies: a journal file, a database, or a proxy of one."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.pool import NullPool

from gatedadapters.errors import StudyError

GRPC, SQLITE, POSTGRES = "grpc://", "sqlite", "postgresql://"
_WAIT = 10  # seconds that a proxy has to answer


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
    try:
        if text.startswith(GRPC):
            return _proxy(text)
        if "://" in text:
            return _database(text)
        return _journal(Path(text), create)
    except StudyError:
        raise
    except Exception as error:  # every back end and driver raises its own kinds of error
        raise StudyError(
            "the storage cannot be reached",
            expected="a file, grpc://HOST:PORT, or the URL of a database",
            got=f"{type(error).__name__}: {_first_line(error)}",
            where=f"storage {_without_password(text)}",
            fix="check the address, the server, and that its driver is installed (gatedadapters[postgresql])",
        ) from error


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
        with path.open("rb") as file:
            start = file.read(1)
        if start != b"{":
            raise StudyError(
                "this file is no journal",
                expected="one JSON object a line",
                got=f"a file that starts with {start!r}",
                where=f"storage {path}",
                fix="give another file; a database is named by a URL",
            )
    return JournalStorage(JournalFileBackend(str(path)))


def _database(url: str) -> BaseStorage:
    if url.startswith(SQLITE):
        return RDBStorage(url)
    # Trials take minutes. A connection kept open between two writes would occupy the server, and many servers cut it.
    return RDBStorage(_with_driver(url), engine_kwargs={"poolclass": NullPool})


def _proxy(text: str) -> BaseStorage:
    host, _, port = text.removeprefix(GRPC).rstrip("/").rpartition(":")
    if not host or not port.isdigit():
        raise StudyError(expected="grpc://HOST:PORT", got=text, where="storage", fix="name both")
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


def _without_password(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    user, at, host = rest.rpartition("@")
    return f"{scheme}{mark}{user.partition(':')[0]}{at}{host}" if at else url
