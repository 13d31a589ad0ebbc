"""Search the structure of an adapter for your own model and tables, as a YAML file says."""

from __future__ import annotations

import argparse

from gatedadapters import experiments
from gatedadapters.cli.arguments import add_run_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_run_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Run it and print the result."""
    print(experiments.search(options.config, options.out, overwrite=options.overwrite))
