"""Tune a language model on your own text while protecting what it knows, as a YAML file says."""

from __future__ import annotations

import argparse
from pathlib import Path

from gatedadapters.config import SelectConfig


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--out", type=Path, help="folder for the results (default: the configuration's name)")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier results in --out")


def run(options: argparse.Namespace) -> None:
    """Do it."""
    from gatedadapters.experiments import select as tuning  # training takes seconds to import

    config = SelectConfig.load(options.config)
    folder = options.out or Path(options.config.stem)
    print(tuning.run(config, folder, overwrite=options.overwrite))
