"""The command line: thin commands over the API."""

from gatedadapters.cli.main import main

__all__ = ["main"]
