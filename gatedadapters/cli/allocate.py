"""Choose a structure of a given size from a short probe, before any training, as the YAML file of a search says."""

from __future__ import annotations

import argparse

from gatedadapters import experiments
from gatedadapters.cli.arguments import add_run_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_run_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Run it and print the result."""
    print(experiments.allocate(options.config, options.out, overwrite=options.overwrite))
