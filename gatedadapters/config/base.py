"""The base of all configuration objects: frozen, strict about keys, with errors that say what to correct."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic_core import PydanticSerializationError, to_json

from gatedadapters.artefact_files import RecordFile, read_record_file
from gatedadapters.errors import ArtifactError, ConfigError
from gatedadapters.safe_files import read_text
from gatedadapters.untrusted import MOST_YAML_BYTES, load_yaml

Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what numpy and torch both take
Count = Annotated[int, Field(gt=0, le=10**9)]  # steps, examples, batches: more than anyone runs
Units = Annotated[int, Field(gt=0, le=2**16)]  # ranks and widths: wider than the layers of any model

Place = Annotated[str, Field(max_length=4096)]  # a path or the id of a model; no system takes longer paths


class Config(BaseModel):
    """A frozen configuration.

    Unknown keys and values out of range raise `ConfigError`, both in the constructor and in `parse`.

    Attributes:
        added: fields that release 0.1 did not have. They are written only where they differ from their default, so that
            structures, studies and streams of 0.1 compare equal to the same ones made now.
    """

    added: ClassVar[tuple[str, ...]] = ()

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False, allow_inf_nan=False)

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            cls = type(self)
            raise config_error(error, where=cls.__name__, known=tuple(cls.model_fields)) from None

    # Tells pydantic that this is not a custom constructor. It then validates nested fields itself instead of calling
    # the constructor of each, and errors name the whole path of a key.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_serializer(mode="wrap")
    def _without_new_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        data: dict[str, Any] = write(self)
        silent = set(self.added) - set(self.changed_fields(self.added))
        return {name: value for name, value in data.items() if name not in silent} if silent else data

    def changed_fields(self, names: Collection[str]) -> list[str]:
        """The fields among `names` whose value is not the default, sorted."""
        defaults = {n: type(self).model_fields[n].get_default(call_default_factory=True) for n in names}
        return sorted(name for name, default in defaults.items() if getattr(self, name) != default)

    @classmethod
    def parse(cls, data: Any, *, where: str) -> Self:
        """Validate plain data.

        Args:
            data: a mapping of fields to values, or an object of this class.
            where: where the data come from, for errors: a file, an argument.

        Raises:
            ConfigError: the data are not valid; every wrong key is named.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise config_error(error, where=where, known=tuple(cls.model_fields)) from None


class FileConfig(Config):
    """A configuration that a command reads from a YAML file."""

    _folder: Path | None = PrivateAttr(None)
    _written: dict[str, str] = PrivateAttr(default_factory=dict)  # resolved path -> the path as the file names it

    @classmethod
    def load(cls, file: str | Path) -> Self:
        """Read a YAML file. Relative paths in it count from the folder of the file.

        Raises:
            ConfigError: the file cannot be read, or keys are unknown or invalid.
        """
        path = Path(file)
        return cls.read(read_yaml(path), path.absolute().parent, where=str(path))

    @classmethod
    def read(cls, data: Any, folder: Path | None, *, where: str) -> Self:
        """Validate plain data that hold relative paths.

        Args:
            data: a mapping of fields to values.
            folder: the folder that relative paths count from; None leaves them as they are, to count from the current
                one.
            where: where the data come from, for errors.

        Raises:
            ConfigError: keys are unknown or invalid.
        """
        given = cls.parse(data, where=where)
        if folder is None:
            return given
        found = given.from_folder(folder)
        before, after = given.model_dump(mode="json"), found.model_dump(mode="json")
        found._folder, found._written = folder, dict(_changed_texts(before, after))
        return found

    def from_folder(self, folder: Path) -> Self:
        """A copy whose relative paths are resolved against `folder`. A class without paths returns itself."""
        return self

    def __eq__(self, other: object) -> bool:
        """Whether the fields are equal, whatever file each was read from."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def folder(self) -> Path | None:
        """The folder of the file it was read from; None if it was built in Python."""
        return self._folder

    def as_written(self, folder: Path | None = None, **options: Any) -> dict[str, Any]:
        """Plain data in which paths stand as the file names them, so that the data are the same on every machine.

        Args:
            folder: name relative paths as they count from this folder instead. Absolute paths stay absolute.
            options: passed to pydantic's `model_dump`.
        """
        names = self._written if folder is None else {path: _counted_from(folder, path) for path in self._written}
        data: dict[str, Any] = _renamed(self.model_dump(mode="json", **options), names)
        return data

    def to_yaml(self, folder: Path | None = None) -> str:
        """YAML that `load` reads back. Fields at their default are left out.

        Args:
            folder: the folder that the text is written to: relative paths are named as they count from there. None
                writes resolved paths, which are valid from any folder of this machine.
        """
        return yaml.safe_dump(self._yaml_data(folder), sort_keys=False)

    def _yaml_data(self, folder: Path | None) -> dict[str, Any]:
        if folder is None:
            return self.model_dump(mode="json", exclude_defaults=True)
        return self.as_written(folder, exclude_defaults=True)

    def read_like(self, other: FileConfig) -> Self:
        """A copy that counts as read from the file of `other`, so that `as_written` names paths as that file does."""
        copy = self.model_copy()
        copy._folder, copy._written = other._folder, dict(other._written)
        return copy


def _counted_from(folder: Path, path: str) -> str:
    """`path` relative to `folder`. Links are resolved first, because the system follows them before it goes up."""
    return os.path.relpath(Path(path).parent.resolve() / Path(path).name, folder.resolve())


def _changed_texts(before: Any, after: Any) -> Iterator[tuple[str, str]]:
    """(after, before) of every text that differs between two nested data of the same shape."""
    if isinstance(before, dict):
        for key in before:
            yield from _changed_texts(before[key], after[key])
    elif isinstance(before, list):
        for one, other in zip(before, after, strict=True):
            yield from _changed_texts(one, other)
    elif isinstance(before, str) and before != after:
        yield after, before


def _renamed(data: Any, names: Mapping[str, str]) -> Any:
    """Nested data in which every text among `names` is replaced."""
    if isinstance(data, dict):
        return {key: _renamed(value, names) for key, value in data.items()}
    if isinstance(data, list):
        return [_renamed(value, names) for value in data]
    return names.get(data, data) if isinstance(data, str) else data


def found_in(folder: Path, name: str) -> str:
    """The path of `name` in `folder` if something lies there, else `name` itself, which may be the id of a model."""
    return str(folder / name) if (folder / name).exists() else name


_MOST_PROBLEMS = 10  # wrong keys that an error names
Record = TypeVar("Record", bound=Config)


def config_error(error: ValidationError, *, where: str, known: tuple[str, ...] = ()) -> ConfigError:
    """Turn pydantic's report into a ConfigError.

    Args:
        error: what pydantic raised.
        where: where the data come from.
        known: names of the fields that the data may have.
    """
    problems = []
    for item in error.errors():
        inner = item.get("ctx", {}).get("error")
        if isinstance(inner, ConfigError):  # raised by a nested configuration: its fix is more precise than ours
            return ConfigError(
                inner.message, expected=inner.expected, got=inner.got, where=f"{where}: {inner.where}", fix=inner.fix
            )
        place = ".".join(str(part) for part in item["loc"]) or "(top level)"
        problems.append(f"{place}: {item['msg']} (got {_shown(item['input'])})")
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"and {len(problems) - _MOST_PROBLEMS} more"]
    return ConfigError(
        expected="valid configuration" + (f" with keys among {', '.join(known)}" if known else ""),
        got="; ".join(problems),
        where=where,
        fix="correct the named keys",
    )


def _shown(value: object) -> str:
    """The beginning of a value, for an error, whatever its size."""
    try:
        return reprlib.repr(value)[:80]
    except ValueError:  # Python prints no number of more than 4,300 digits
        return f"a very long {type(value).__name__}"


def read_yaml(path: Path) -> Any:
    """The plain data of a YAML file.

    Raises:
        ConfigError: the file cannot be read or is not YAML.
    """
    try:
        return load_yaml(read_text(path, most=MOST_YAML_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigError(
            expected="a readable YAML file",
            got=str(error),
            where=path,
            fix="check the path and the syntax",
        ) from error


def read_record(
    kind: type[Record],
    file: Path,
    *,
    what: str,
    expected: str,
    fix: str,
    verify: bool = True,
    versions: Collection[int] | None = (1,),
) -> tuple[Record, RecordFile]:
    """Read the JSON record that lies in the folder of an artefact.

    Args:
        kind: class of the record.
        file: the JSON file.
        what: the artefact, for errors: "a saved mask".
        expected: what the folder should hold, for errors.
        fix: what to do where there is no such file, for errors.
        verify: check digests; see `read_record_file`.
        versions: those that are known; None if such records have no version.

    Returns:
        The record, and the file with the digests of the tensors beside it.

    Raises:
        ArtifactError: the file is missing, foreign or damaged, is of another version, or has unknown or missing keys,
            or values of another type.
    """
    try:
        found = read_record_file(file, verify=verify, what=what, versions=versions)
    except ArtifactError:
        raise
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"this is not {what}",
            expected=expected,
            got=str(error),
            where=file.parent,
            fix=fix,
        ) from error
    return parse_record(kind, found.data, what=what, where=file), found


def parse_record(kind: type[Record], data: Mapping[str, Any], *, what: str, where: Path | str) -> Record:
    """Validate the plain data of a record, without any conversion: a number in quotes is no number.

    Args:
        kind: class of the record.
        data: the record without its digests.
        what: the artefact, for errors: "a saved mask".
        where: the file, for errors.

    Raises:
        ArtifactError: unknown or missing keys, or values of another type.
    """
    try:
        return kind.model_validate_json(to_json(data), strict=True)
    except PydanticSerializationError as error:  # half of a surrogate pair
        raise ArtifactError(
            f"this is not {what} as it was saved",
            expected="text",
            got=str(error),
            where=where,
            fix="copy the folder again as it was saved",
        ) from None
    except ValidationError as error:
        wrong = config_error(error, where=str(where), known=tuple(kind.model_fields))
        raise ArtifactError(
            wrong.message or f"this is not {what} as it was saved",
            expected=wrong.expected,
            got=wrong.got,
            where=where,
            fix="copy the folder again as it was saved, or read it with the release that wrote it",
        ) from None
