"""Write the report of a study as far as it has come: HTML, Markdown, pictures, the best configurations."""

from __future__ import annotations

import argparse
from pathlib import Path

from gatedadapters.cli import study
from gatedadapters.cli.arguments import add_study_arguments
from gatedadapters.errors import ArtifactError, ConfigError
from gatedadapters.structure.folder import adapter_folder, is_unfinished_run


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_study_arguments(parser)
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write every trial as a TensorBoard run, too")


def run(options: argparse.Namespace) -> None:
    """Write the report, and the runs for TensorBoard where they are asked for."""
    _check_is_study(Path(options.config))
    found = study.load(options, create=False)
    if options.tensorboard is not None:
        found.tensorboard(options.tensorboard)
    study.write_report(found, options)


def _check_is_study(given: Path) -> None:
    """Raise if this is the folder of a run or of an adapter, which have their results beside them already."""
    if not given.is_dir():
        return
    if is_unfinished_run(given):
        got, fix = (
            "the folder of a run that has saved no adapter yet",
            "let it finish, then look with gatedadapters show",
        )
    else:
        try:
            adapter_folder(given)
        except ArtifactError:
            return  # what is wrong with it, reading the study says
        table = given / "table.txt"
        got, fix = "the folder of a saved adapter", f"gatedadapters show {given} prints the structure"
        fix += f"; the scores are in {table}" if table.is_file() else ""
    raise ConfigError(
        "this is a search, not a study",
        expected="the YAML file of a study, or the name of a preset",
        got=got,
        where=given,
        fix=fix,
    )
