"""Records that are given in Python in place of a file: a `datasets.Dataset`, or a list of mappings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

_PREFIX = "rows:"


class Rows(Sequence[Mapping[str, Any]]):
    """Records in the place of a file. Equal records are one object; as text they are a digest.

    A configuration that is copied through plain data (a study does so) finds its records again by the digest, within
    one process. A YAML file that holds such a digest cannot be read back.

    Args:
        records: has a length and integer indices; each record maps columns to values.
    """

    _known: ClassVar[WeakValueDictionary[str, Rows]] = WeakValueDictionary()

    records: Any
    _text: str

    def __new__(cls, records: Any) -> Rows:
        """The records, as the object that the process holds of them already if it does."""
        digest = hashlib.sha256()
        for index in range(len(records)):
            digest.update(json.dumps(records[index], sort_keys=True, default=str).encode())
        text = f"{_PREFIX}{digest.hexdigest()[:16]}"
        found = cls._known.get(text)
        if found is None:
            found = cls._known[text] = super().__new__(cls)
            found.records, found._text = records, text
        return found

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self.records[index]

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return (self.records[index] for index in range(len(self)))

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"Rows({len(self)} records, {self._text})"

    def __reduce__(self) -> Any:  # a process that reads the pickle knows the records by their digest, too
        return Rows, (self.records,)

    @classmethod
    def of(cls, value: Any) -> Any:
        """Records as `Rows`; a path, or what is no collection of records, as it is.

        Raises:
            ValueError: the text names records that this process does not hold.
        """
        if isinstance(value, str) and value.startswith(_PREFIX):
            found = cls._known.get(value)
            if found is None:
                raise ValueError(f"{value} stands for records that were given in Python: give them there again")
            return found
        if isinstance(value, (str, Rows, Mapping)) or not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
            return value
        return cls(value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.is_instance_schema(cls, serialization=core_schema.to_string_ser_schema())
