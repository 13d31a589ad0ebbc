"""Study how a search responds to the sparsity weight, noise, perturbed data or any of its fields, or optimise it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from gatedadapters.cli.arguments import add_study_arguments
from gatedadapters.errors import ConfigError

if TYPE_CHECKING:
    from gatedadapters.studies import Study


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_study_arguments(parser)
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine (1)")
    parser.add_argument("--trials", type=int, help="at most so many more trials (all that are missing)")


def run(options: argparse.Namespace) -> None:
    """Run what is missing of the study, and write its report."""
    for name in ("workers", "trials"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(expected="1 or more", got=value, where=f"--{name}", fix="raise it")
    study = load(options, create=True)
    study.check_report(report_folder(study, options), overwrite=options.overwrite)
    write_report(study.run(options.trials, workers=options.workers), options)


def load(options: argparse.Namespace, *, create: bool) -> Study:
    """The study that the options name; `create` makes it where the storage holds none of its name."""
    from gatedadapters.studies import Study  # Optuna takes a moment to import

    given = {"search": options.search, "storage": options.storage, "name": options.name}
    return Study.load(options.config, **given, create=create)


def write_report(study: Study, options: argparse.Namespace) -> None:
    """Print how far the study is, and write its report."""
    print(study)
    print(f"\nReport: {study.report(report_folder(study, options), overwrite=options.overwrite)}")


def report_folder(study: Study, options: argparse.Namespace) -> Path:
    """The folder of the report: the one that is asked for, or one named after the study."""
    return Path(options.out or f"{study.config.name}-report")
