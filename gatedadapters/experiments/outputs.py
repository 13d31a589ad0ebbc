"""The output folder of a run: the names of its files, and how they are checked, written and listed.

Every name is defined once: here, or with what writes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from gatedadapters.config.base import FileConfig
from gatedadapters.errors import ArtifactError, ConfigError
from gatedadapters.reporting.versions import versions
from gatedadapters.safe_files import check_writable, file_errors
from gatedadapters.structure.folder import ADAPTER as ADAPTER
from gatedadapters.structure.folder import STRUCTURE
from gatedadapters.transfer.evaluate import TRANSFER_TRAINED as TRANSFER_TRAINED

METRICS = "metrics.json"
TABLE = "table.txt"
REPORT = "report.txt"
WORTH = "worth.json"
LOGS = "tensorboard"

PEFT = "peft"
DELTA = "delta"
STREAMS = "streams"

STRUCTURE_PICTURE = "structure.png"
FRONTIER_PICTURE = "frontier.png"
SHIFT_PICTURE = "shift.png"
PICTURES = "pictures"

SEARCH_CONFIG = "search.yaml"
ALLOCATE_CONFIG = "allocate.yaml"
CONTINUAL_CONFIG = "continual.yaml"
TRANSFER_CONFIG = "transfer.yaml"

# Names that each run writes, and may therefore replace. A search and a compression may replace each other's results.
OF_SEARCH = frozenset({ADAPTER, PEFT, STRUCTURE_PICTURE, METRICS, TABLE, SEARCH_CONFIG, LOGS})
OF_ALLOCATE = frozenset({STRUCTURE, STRUCTURE_PICTURE, FRONTIER_PICTURE, WORTH, METRICS, TABLE, ALLOCATE_CONFIG})
OF_SELECT = frozenset({DELTA, METRICS, REPORT, LOGS})
OF_CONTINUAL = frozenset({STREAMS, PICTURES, METRICS, TABLE, CONTINUAL_CONFIG, LOGS})
OF_TRANSFER = frozenset({ADAPTER, TRANSFER_TRAINED, SHIFT_PICTURE, METRICS, TABLE, TRANSFER_CONFIG})

AnyConfig = TypeVar("AnyConfig", bound=FileConfig)


def config_and_folder(
    kind: type[AnyConfig], config: AnyConfig | str | Path, out: str | Path | None
) -> tuple[AnyConfig, Path]:
    """The configuration of a run and the folder of its results, from the arguments of the run.

    Args:
        kind: class of the configuration.
        config: the configuration, or the path of its YAML file.
        out: the folder. None takes the name of the file without its suffix, in the current folder.

    Raises:
        ConfigError: the file is not valid, the configuration is of another class, or a configuration is given as an
            object and `out` is None.
    """
    if isinstance(config, (str, Path)):
        return kind.load(config), Path(out if out is not None else Path(config).stem)
    if type(config) is not kind:
        raise ConfigError(
            "this is not the configuration of such a run",
            expected=f"a {kind.__name__}, or the path of a YAML file",
            got=type(config).__name__,
            where="config",
            fix=f"build it with gatedadapters.config.{kind.__name__}",
        )
    if out is None:
        raise ConfigError(
            "where the results go is not said",
            expected="out=, the folder of the results",
            got="a configuration without a file to take the name from",
            where=f"a {kind.__name__} built in Python",
            fix='give a folder: out="runs/first"',
        )
    return config, Path(out)


def check_output_folder(folder: Path, results: frozenset[str], *, overwrite: bool) -> None:
    """Check that results can be written into `folder`. A run calls this before it computes anything.

    TensorBoard logs do not count as results: a run that failed leaves them for inspection, and the next run replaces
    them.

    Args:
        folder: the output folder; it need not exist.
        results: names that runs of this kind write.
        overwrite: whether earlier results may be replaced.

    Raises:
        ArtifactError: `folder` is a file, holds earlier results that may not be replaced, or holds anything else.
        FileAccessError: `folder` cannot be written.
    """
    with file_errors("use the output folder", folder):
        held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in held if name not in results]
    if folder.exists() and not folder.is_dir():
        held = foreign = ["a file"]
    earlier = [name for name in held if name != LOGS]
    if foreign or (earlier and not overwrite):
        raise ArtifactError(
            "the output folder is not empty",
            expected="a new or an empty folder",
            got=", ".join(foreign[:3] or earlier[:3]),
            where=folder,
            fix="give another with --out" + ("" if foreign else ", or --overwrite"),
        )
    check_writable(folder)


def write_metrics(folder: Path, data: Mapping[str, Any]) -> None:
    """Write the numbers of a run, after the versions of the packages that computed them."""
    text = json.dumps({"versions": versions(), **data}, indent=1)
    (folder / METRICS).write_text(text + "\n", encoding="utf-8")


def write_table(folder: Path, table: str) -> None:
    """Write the table that a run prints."""
    (folder / TABLE).write_text(table + "\n", encoding="utf-8")


def list_outputs(contents: Mapping[str, str], *, width: int = 15) -> str:
    """One line for each file or folder, with what it holds; names are padded to `width` characters."""
    return "\n".join(f"  {name:<{width}} {what}" for name, what in contents.items())
