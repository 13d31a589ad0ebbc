"""Search the structure of an adapter for your own model and tables, as a YAML file says."""

from __future__ import annotations

import argparse
from pathlib import Path

from gatedadapters.config import SearchConfig


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--out", type=Path, help="folder for the results (default: the configuration's name)")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in --out")


def run(options: argparse.Namespace) -> None:
    """Do it."""
    from gatedadapters.experiments import search as outcome  # training takes seconds to import

    config = SearchConfig.load(options.config)
    folder = options.out or Path(options.config.stem)
    outcome.report(config, folder, outcome.run(config, folder, overwrite=options.overwrite))
