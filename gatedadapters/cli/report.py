"""Write the report of a study as far as it has come: HTML, Markdown, pictures, the best configurations."""

from __future__ import annotations

import argparse
from pathlib import Path

from gatedadapters.cli import study
from gatedadapters.cli.arguments import add_study_arguments


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_study_arguments(parser)
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write every trial as a TensorBoard run, too")


def run(options: argparse.Namespace) -> None:
    """Write the report, and the runs for TensorBoard where they are asked for."""
    found = study.load(options, create=False)
    if options.tensorboard is not None:
        found.tensorboard(options.tensorboard)
    study.write_report(found, options)
