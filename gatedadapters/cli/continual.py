"""Tune a model on one task after another without losing the earlier ones, as a YAML file says."""

from __future__ import annotations

import argparse
from pathlib import Path

from gatedadapters.config import ContinualConfig


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--out", type=Path, help="folder for the results (default: the configuration's name)")
    parser.add_argument("--overwrite", action="store_true", help="start anew where --out holds earlier results")


def run(options: argparse.Namespace) -> None:
    """Do it; a run that was stopped goes on where it was."""
    from gatedadapters.experiments import continual as streaming  # training takes seconds to import

    config = ContinualConfig.load(options.config)
    folder = options.out or Path(options.config.stem)
    streaming.report(folder, streaming.run(config, folder, overwrite=options.overwrite))
