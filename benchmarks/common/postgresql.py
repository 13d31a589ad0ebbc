"""A real PostgreSQL server, for a while; used by the benchmark `storage` and by tests."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def binaries() -> Path | None:
    """The folder of the server's programs, on the path or where distributions put them; None where there is none."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    places = (*Path("/usr/lib/postgresql").glob("*/bin"), *Path("/opt/homebrew/opt").glob("postgresql*/bin"))
    return next((place for place in sorted(places, reverse=True) if (place / "initdb").exists()), None)


def free_port() -> int:
    """One that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_server() -> Iterator[str]:
    """The URL of an empty database in a cluster that lives as long as the block."""
    import psycopg

    programs, user = binaries(), None
    assert programs is not None
    if os.geteuid() == 0:  # the server refuses to run as root
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = next(name for name in ("postgres", "nobody") if name in names)
    with tempfile.TemporaryDirectory(prefix="pg-") as folder:  # pytest's own folders are closed to other users
        if user is not None:
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        data, port, log = f"{folder}/data", free_port(), Path(folder, "log")
        make = [programs / "initdb", "-D", data, "-U", "tester", "--auth=trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(make, check=True, user=user, cwd=folder, capture_output=True)
        options = {"listen_addresses": "127.0.0.1", "unix_socket_directories": folder, "fsync": "off"}
        serve = [programs / "postgres", "-D", data, "-p", str(port), *(f"--{k}={v}" for k, v in options.items())]
        with log.open("w") as output:
            server = subprocess.Popen(serve, user=user, cwd=folder, stdout=output, stderr=output)
        try:
            until = time.monotonic() + 60
            while True:
                try:
                    psycopg.connect(f"host=127.0.0.1 port={port} user=tester dbname=postgres").close()
                    break
                except psycopg.OperationalError:
                    assert server.poll() is None, log.read_text()
                    assert time.monotonic() < until, log.read_text()
                    time.sleep(0.2)
            yield f"postgresql://tester@127.0.0.1:{port}/postgres"
        finally:
            server.send_signal(signal.SIGINT)  # at once: SIGTERM would wait until every client is gone
            server.wait()
