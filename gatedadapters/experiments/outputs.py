"""The files that a run leaves in its folder: their names, and how they are checked, written and listed.

Every name is defined here and nowhere else, so that a run, `show`, a test and a guide cannot disagree.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from gatedadapters.config.base import FileConfig
from gatedadapters.errors import ArtifactError, ConfigError
from gatedadapters.reporting.versions import versions

METRICS = "metrics.json"
TABLE = "table.txt"
REPORT = "report.txt"
LOGS = "tensorboard"

ADAPTER = "adapter"
TRANSFER_TRAINED = "transfer-trained"
PEFT = "peft"
DELTA = "delta"
STREAMS = "streams"

STRUCTURE_PICTURE = "structure.png"
SHIFT_PICTURE = "shift.png"
PICTURES = "pictures"

SEARCH_CONFIG = "search.yaml"
CONTINUAL_CONFIG = "continual.yaml"
TRANSFER_CONFIG = "transfer.yaml"

# What each run may find in its folder and replace. A search and a compression leave the same kind of results.
OF_SEARCH = frozenset({ADAPTER, PEFT, STRUCTURE_PICTURE, METRICS, TABLE, SEARCH_CONFIG, LOGS})
OF_SELECT = frozenset({DELTA, METRICS, REPORT, LOGS})
OF_CONTINUAL = frozenset({STREAMS, PICTURES, METRICS, TABLE, CONTINUAL_CONFIG, LOGS})
OF_TRANSFER = frozenset({ADAPTER, TRANSFER_TRAINED, SHIFT_PICTURE, METRICS, TABLE, TRANSFER_CONFIG})

AnyConfig = TypeVar("AnyConfig", bound=FileConfig)


def config_and_folder(
    kind: type[AnyConfig], config: AnyConfig | str | Path, out: str | Path | None
) -> tuple[AnyConfig, Path]:
    """What a run was given: its configuration, and the folder of its results.

    Args:
        kind: class of the configuration.
        config: the configuration, or the YAML file to load it from.
        out: the folder; None takes the name of the file, without its suffix, in the current folder.

    Raises:
        ConfigError: the file is not valid, the configuration is of another class, or a configuration that comes from no
            file is given without a folder.
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
    """Make sure that results can go into `folder`, before anything is computed.

    TensorBoard logs alone do not count as results: a run that failed leaves them to be looked at, and the next run
    writes its own.

    Args:
        folder: of the results; it need not exist.
        results: names that an earlier run of the same kind may have left there.
        overwrite: whether such results may be replaced.

    Raises:
        ArtifactError: `folder` is a file, holds earlier results that may not be replaced, or holds anything else.
    """
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


def write_metrics(folder: Path, data: Mapping[str, Any]) -> None:
    """Write every number of a run, after the versions that it was computed with."""
    text = json.dumps({"versions": versions(), **data}, indent=1)
    (folder / METRICS).write_text(text + "\n", encoding="utf-8")


def write_table(folder: Path, table: str) -> None:
    """Write the table that a run prints."""
    (folder / TABLE).write_text(table + "\n", encoding="utf-8")


def list_outputs(contents: Mapping[str, str], *, width: int = 15) -> str:
    """Lines that say what each file or folder of a run holds; names are padded to `width` characters."""
    return "\n".join(f"  {name:<{width}} {what}" for name, what in contents.items())
