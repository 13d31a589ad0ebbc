"""Study how a search responds to the sparsity weight, noise, perturbed data or any of its fields, or optimise it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from gatedadapters.errors import ConfigError

if TYPE_CHECKING:
    from gatedadapters.studies import Study


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    common_arguments(parser)
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine (1)")
    parser.add_argument("--trials", type=int, help="at most so many more trials (all that are missing)")


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """Which study, and where its report goes."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a study preset")
    parser.add_argument("--search", type=Path, help="the search to study, in place of the one in CONFIG")
    parser.add_argument("--name", help="of the study, in place of the one in CONFIG")
    parser.add_argument("--storage", help="a file, a database's URL, or grpc://HOST:PORT (default: NAME.journal)")
    parser.add_argument("--out", type=Path, help="folder for the report (default: NAME-report)")
    parser.add_argument("--overwrite", action="store_true", help="replace the report of another study in that folder")


def run(options: argparse.Namespace) -> None:
    """Do it."""
    for name in ("workers", "trials"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(expected="1 or more", got=value, where=f"--{name}", fix="raise it")
    study = load(options, create=True)
    study.run(options.trials, workers=options.workers)
    report(study, options)


def load(options: argparse.Namespace, *, create: bool) -> Study:
    """The study that was named."""
    from gatedadapters.studies import Study  # training takes seconds to import

    given = {"search": options.search, "storage": options.storage, "name": options.name}
    return Study.load(options.config, **given, create=create)


def report(study: Study, options: argparse.Namespace) -> None:
    """Print how far it is, and write its report."""
    print(study)
    folder = options.out or Path(f"{study.config.name}-report")
    print(f"\nReport: {study.report(folder, overwrite=options.overwrite)}")
