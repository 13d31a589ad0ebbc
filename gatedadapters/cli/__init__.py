"""The command line: one thin file a command, each a parser and one call of the Python API."""

from gatedadapters.cli.main import main

__all__ = ["main"]
