"""Print the structure of a saved adapter, what its tasks share, and its size."""

from __future__ import annotations

import argparse
from pathlib import Path

from gatedadapters import experiments


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("folder", metavar="DIR", help="a saved adapter, the output folder of a search, or a hub id")
    parser.add_argument("--png", type=Path, metavar="FILE", help="also draw it")
    parser.add_argument("--diff", metavar="OTHER", help="list what changes from DIR to OTHER instead")


def run(options: argparse.Namespace) -> None:
    """Print it."""
    print(experiments.show(options.folder, png=options.png, diff=options.diff))
