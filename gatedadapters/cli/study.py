"""Study how a search responds to the sparsity weight, noise, perturbed data or any of its fields, or optimise it."""

from __future__ import annotations

import argparse
from pathlib import Path

from gatedadapters.errors import ConfigError


def arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a study preset")
    parser.add_argument("--search", type=Path, help="the search to study, in place of the one in CONFIG")
    parser.add_argument("--storage", help="a file (NAME.journal), a database's URL, or grpc://HOST:PORT")
    parser.add_argument("--workers", type=int, default=1, help="processes on this machine (1)")
    parser.add_argument("--trials", type=int, help="at most so many more trials (all that are missing)")
    parser.add_argument("--out", type=Path, help="folder for the report (default: NAME-report)")


def run(options: argparse.Namespace) -> None:
    """Do it."""
    from gatedadapters.studies import Study  # training takes seconds to import

    for name in ("workers", "trials"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(expected="1 or more", got=value, where=f"--{name}", fix="raise it")
    study = Study.load(options.config, search=options.search, storage=options.storage)
    study.run(options.trials, workers=options.workers)
    print(study)
    folder = options.out or Path(f"{study.config.name}-report")
    print(f"\nReport: {study.report(folder, overwrite=True)}")
