"""Arguments that several commands take."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_run_arguments(parser: argparse.ArgumentParser, *, overwrite: str = "replace earlier results in --out") -> None:
    """A run's configuration and the folder of its results; `overwrite` says what that option does."""
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--out", type=Path, help="folder for the results (default: the configuration's name)")
    parser.add_argument("--overwrite", action="store_true", help=overwrite)


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Which study, and where its report goes."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a study preset")
    parser.add_argument("--search", type=Path, help="the search to study, in place of the one in CONFIG")
    parser.add_argument("--name", help="of the study, in place of the one in CONFIG")
    parser.add_argument("--storage", help="a file, a database's URL, or grpc://HOST:PORT (default: NAME.journal)")
    parser.add_argument("--out", type=Path, help="folder for the report (default: NAME-report)")
    parser.add_argument("--overwrite", action="store_true", help="replace the report of another study in that folder")
