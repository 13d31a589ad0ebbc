"""Processes for tests that need some, forked from one that has imported torch and transformers already.

A new interpreter takes more than four seconds of processor time to import them, whatever the test then does. No module
of gatedadapters, optuna, peft and the like is loaded where these processes start.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed", "transformers.modeling_utils"])


def start(
    function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None, log: Path | None = None
) -> BaseProcess:
    """A process that calls a function which can be imported; what it prints goes to `log`, or nowhere."""
    process = CONTEXT.Process(target=_call, args=(function, arguments, dict(environment or {}), log or os.devnull))
    process.start()
    return process


def run(function: Callable[..., Any], *arguments: Any, log: Path, environment: Mapping[str, str] | None = None) -> str:
    """Start such a process and wait for it; what it printed. It must end without an error."""
    process = start(function, *arguments, environment=environment, log=log)
    process.join(240)
    printed = log.read_text()
    assert process.exitcode == 0, f"exit code {process.exitcode}\n{printed[-3000:]}"
    return printed


def script(path: Path, *arguments: str) -> None:
    """What `python PATH ARGUMENTS` does."""
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def module(name: str, *arguments: str) -> None:
    """What `python -m NAME ARGUMENTS` does."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__")


def code(text: str, *arguments: str) -> None:
    """What `python -c TEXT ARGUMENTS` does."""
    sys.argv = ["-c", *arguments]
    exec(compile(text, "<code>", "exec"), {"__name__": "__main__"})


def _call(function: Callable[..., Any], arguments: Sequence[Any], environment: dict[str, str], log: Path | str) -> None:
    gc.freeze()  # see conftest.py
    warnings.simplefilter("ignore")
    os.environ.update(environment)
    with open(log, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    function(*arguments)
