"""The command line: its commands, how one is chosen, and how it shows errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gatedadapters.cli import (
    allocate,
    compress,
    continual,
    export,
    normalise,
    plan,
    predict,
    quickstart,
    report,
    search,
    select,
    show,
    study,
    transfer,
)
from gatedadapters.config.plugins import load_plugins
from gatedadapters.errors import GatedAdaptersError
from gatedadapters.safe_files import file_errors

COMMANDS = (
    quickstart,
    search,
    allocate,
    compress,
    select,
    continual,
    transfer,
    predict,
    export,
    normalise,
    study,
    report,
    plan,
    show,
)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. The first line of a command's module says what it does."""
    top = argparse.ArgumentParser(prog="gatedadapters", description="Adapters whose place, kind and size are learned.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        summary = (command.__doc__ or "").splitlines()[0]
        own = commands.add_parser(name, help=summary, description=command.__doc__)
        command.arguments(own)
        own.set_defaults(run=command.run)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0 if all went well, 2 if something was wrong with what was given, 130 if it was interrupted.
    """
    options = parser().parse_args(arguments)
    try:
        load_plugins()
        with file_errors("read or write a file", f"gatedadapters {options.command}"):
            options.run(options)
    except GatedAdaptersError as error:
        print(f"gatedadapters {options.command}: {type(error).__name__}\n{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ngatedadapters {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0
