"""Write the report of a study as far as it has come: HTML, Markdown, pictures, the best configurations."""

from __future__ import annotations

import argparse
from pathlib import Path

from gatedadapters.cli import study


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    study.common_arguments(parser)
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write every trial as a TensorBoard run, too")


def run(options: argparse.Namespace) -> None:
    """Do it."""
    found = study.load(options, create=False)
    if options.tensorboard is not None:
        found.tensorboard(options.tensorboard)
    study.report(found, options)
