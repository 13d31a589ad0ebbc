"""Tune a model on one task after another without losing the earlier ones, as a YAML file says."""

from __future__ import annotations

import argparse

from gatedadapters import experiments
from gatedadapters.cli.arguments import add_run_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_run_arguments(parser, overwrite="start anew where --out holds earlier results")


def run(options: argparse.Namespace) -> None:
    """Run it, or go on where it was stopped, and print the result."""
    print(experiments.continual(options.config, options.out, overwrite=options.overwrite))
