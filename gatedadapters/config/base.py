"""What every configuration object shares: frozen, strict about keys, with errors a reader can act on."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from gatedadapters.errors import ArtifactError, ConfigError


class Config(BaseModel):
    """A frozen configuration; unknown keys and out-of-range values raise `ConfigError`, from the constructor as well as
    through `parse`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            cls = type(self)
            raise config_error(error, where=cls.__name__, known=tuple(cls.model_fields)) from None

    # pydantic: this is no constructor of its own kind; fields are validated in place, errors keep the key's whole path
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    def changed_fields(self, names: Collection[str]) -> list[str]:
        """Those of `names` that are not at their default."""
        defaults = {n: type(self).model_fields[n].get_default(call_default_factory=True) for n in names}
        return sorted(name for name, default in defaults.items() if getattr(self, name) != default)

    @classmethod
    def parse(cls, data: Any, *, where: str) -> Self:
        """Validate plain data read at `where` (a file, an argument).

        Raises:
            ConfigError: naming every wrong key, what was expected and what was found.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise config_error(error, where=where, known=tuple(cls.model_fields)) from None


class FileConfig(Config):
    """A configuration that a command reads from a YAML file."""

    _folder: Path | None = PrivateAttr(None)
    _written: dict[str, str] = PrivateAttr(default_factory=dict)  # by path: how the file names it

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read a YAML file; relative paths in it count from its folder.

        Raises:
            ConfigError: unreadable file, unknown or invalid keys.
        """
        path = Path(file)
        return cls.read(read_yaml(path), path.absolute().parent, where=str(path))

    @classmethod
    def read(cls, data: Any, folder: Path | None, *, where: str) -> Self:
        """Validate plain data whose relative paths count from `folder` (None: from the current one).

        Raises:
            ConfigError: unknown or invalid keys.
        """
        given = cls.parse(data, where=where)
        if folder is None:
            return given
        found = given.from_folder(folder)
        before, after = given.model_dump(mode="json"), found.model_dump(mode="json")
        found._folder, found._written = folder, dict(_changed_texts(before, after))
        return found

    def from_folder(self, folder: Path) -> Self:
        """The same with relative paths counted from `folder`; of a configuration without paths, itself."""
        return self

    def __eq__(self, other: object) -> bool:
        """Whether both say the same, wherever they were read."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def folder(self) -> Path | None:
        """What relative paths of the file count from; None where it comes from no file."""
        return self._folder

    def as_written(self, folder: Path | None = None, **options: Any) -> dict[str, Any]:
        """Plain data with the file's relative paths as it names them, the same wherever it lies; absolute ones stay.

        Args:
            folder: name them as they count from there instead.
            options: of pydantic's `model_dump`.
        """
        names = self._written if folder is None else {path: _counted_from(folder, path) for path in self._written}
        data: dict[str, Any] = _renamed(self.model_dump(mode="json", **options), names)
        return data

    def to_yaml(self, folder: Path | None = None) -> str:
        """Text that `load` reads back, without what is left at its default.

        Args:
            folder: where the text is written: relative paths are named as they count from there. None names whole
                paths, which are valid everywhere on this machine.
        """
        return yaml.safe_dump(self._yaml_data(folder), sort_keys=False)

    def _yaml_data(self, folder: Path | None) -> dict[str, Any]:
        if folder is None:
            return self.model_dump(mode="json", exclude_defaults=True)
        return self.as_written(folder, exclude_defaults=True)

    def read_like(self, other: FileConfig) -> Self:
        """The same as if it had been read from the file of `other`, whose paths it holds."""
        copy = self.model_copy()
        copy._folder, copy._written = other._folder, dict(other._written)
        return copy


def _counted_from(folder: Path, path: str) -> str:
    """As the system finds it, which follows links before it goes up."""
    return os.path.relpath(Path(path).parent.resolve() / Path(path).name, folder.resolve())


def _changed_texts(before: Any, after: Any) -> Iterator[tuple[str, str]]:
    """Every text of plain data that differs from its place in data of the same shape: (after, before)."""
    if isinstance(before, dict):
        for key in before:
            yield from _changed_texts(before[key], after[key])
    elif isinstance(before, list):
        for one, other in zip(before, after, strict=True):
            yield from _changed_texts(one, other)
    elif isinstance(before, str) and before != after:
        yield after, before


def _renamed(data: Any, names: Mapping[str, str]) -> Any:
    if isinstance(data, dict):
        return {key: _renamed(value, names) for key, value in data.items()}
    if isinstance(data, list):
        return [_renamed(value, names) for value in data]
    return names.get(data, data) if isinstance(data, str) else data


def found_in(folder: Path, name: str) -> str:
    """A file or folder that lies in `folder`, by its path; else the name, which a registry may know."""
    return str(folder / name) if (folder / name).exists() else name


Record = TypeVar("Record", bound=Config)


def config_error(error: ValidationError, *, where: str, known: tuple[str, ...] = ()) -> ConfigError:
    """Turn pydantic's report into one of ours: expected / got / where / what to do."""
    problems = []
    for item in error.errors():
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):  # of one made while this one was checked: it says what to do
            return ConfigError(
                inner.message, expected=inner.expected, got=inner.got, where=f"{where}: {inner.where}", fix=inner.fix
            )
        place = ".".join(str(part) for part in item["loc"]) or "(top level)"
        problems.append(f"{place}: {item['msg']} (got {item['input']!r:.80})")
    return ConfigError(
        expected="valid configuration" + (f" with keys among {', '.join(known)}" if known else ""),
        got="; ".join(problems),
        where=where,
        fix="correct the named keys",
    )


def read_yaml(path: Path) -> Any:
    """The plain data of a YAML file.

    Raises:
        ConfigError: unreadable.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            expected="a readable YAML file",
            got=f"{type(error).__name__}: {error}",
            where=str(path),
            fix="check the path and the syntax",
        ) from error


def read_record(kind: type[Record], file: Path, *, what: str, expected: str, writer: str) -> Record:
    """The record of version 1 in a JSON file that `writer` left in the folder of an artefact.

    Args:
        kind: class of the record.
        file: where it is.
        what: it is of, for errors: "a saved mask".
        expected: what the folder should hold.
        writer: the method that writes such a folder.

    Raises:
        ArtifactError: a missing or foreign file, another version, unknown or missing keys.
    """
    try:
        data = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"this is not {what}",
            expected=expected,
            got=str(error),
            where=file.parent,
            fix=f"give the folder that {writer} wrote",
        ) from error
    version = data.get("version") if isinstance(data, dict) else None
    if version != 1:
        raise ArtifactError(
            expected=f"{what} of version 1",
            got=f"version {version!r}",
            where=file.parent,
            fix="read it with the release that wrote it",
        )
    try:
        return kind.parse(data, where=str(file))
    except ValueError as error:
        raise ArtifactError(str(error), where=file) from None
