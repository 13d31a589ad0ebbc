"""Write the report of a study as far as it has come: HTML, Markdown, pictures, the best configurations."""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("config", metavar="CONFIG", help="the study's YAML file, or the name of a preset")
    parser.add_argument("--search", type=Path, help="the search that was studied, where it was given apart")
    parser.add_argument("--storage", help="where the study is kept (NAME.journal)")
    parser.add_argument("--out", type=Path, help="folder for the report (default: NAME-report)")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write every trial as a TensorBoard run, too")


def run(options: argparse.Namespace) -> None:
    """Do it."""
    from gatedadapters.studies import Study  # training takes seconds to import

    study = Study.load(options.config, search=options.search, storage=options.storage)
    folder = options.out or Path(f"{study.config.name}-report")
    if options.tensorboard is not None:
        study.tensorboard(options.tensorboard)
    print(f"{study}\n\nReport: {study.report(folder, overwrite=True)}")
