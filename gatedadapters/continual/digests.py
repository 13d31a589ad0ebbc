"""Telling two runs apart: digests of data sets, and the first difference between two records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_DEFAULT_REPR: Any = object.__repr__  # holds an address, which differs from process to process
_ABSENT = object()
_SIMPLE_TYPES = frozenset({bool, int, float, str, bytes, type(None)})


def data_digest(*parts: Any) -> str:
    """A digest of data sets that depends on every value of every example.

    Args:
        *parts: data sets with `len` and integer indices.
    """
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(f"{len(part)} items;".encode())
        for index in range(len(part)):
            _update(found, part[index])
    return found.hexdigest()


def difference(earlier: Any, mine: Any) -> tuple[str, str, str]:
    """Where two records (plain data, as read from JSON) first differ, and what each holds there.

    Args:
        earlier: one record.
        mine: another record, which is not equal to it.

    Returns:
        The path of the first difference, such as `.key[0]`; then as text what `earlier` and `mine` hold there.
    """
    if isinstance(earlier, dict) and isinstance(mine, dict):
        key = next(k for k in (*mine, *earlier) if earlier.get(k, _ABSENT) != mine.get(k, _ABSENT))
        if None is earlier.get(key) is mine.get(key):  # one of them lacks it
            one, other = ("null" if key in record else "nothing" for record in (earlier, mine))
            return f".{key}", one, other
        place, one, other = difference(earlier.get(key), mine.get(key))
        return f".{key}{place}", one, other
    if isinstance(earlier, list) and isinstance(mine, list):
        names, own = [_shown(entry) for entry in earlier], [_shown(entry) for entry in mine]
        if names != own and sorted(names) == sorted(own):
            return " (order)", ", ".join(names), ", ".join(own)
        if len(earlier) == len(mine):
            index = next(i for i in range(len(mine)) if earlier[i] != mine[i])
            place, one, other = difference(earlier[index], mine[index])
            return f"[{index}]{place}", one, other
        return "", ", ".join(names), ", ".join(own)
    return "", json.dumps(earlier), json.dumps(mine)


def _shown(entry: Any) -> str:
    """An entry of a list as text: a task's name or file, else the entry itself."""
    keys = [key for key in ("name", "train", "bundled") if entry.get(key)] if isinstance(entry, dict) else []
    return str(entry[keys[0]]) if keys else json.dumps(entry)


def _update(found: Any, value: Any) -> None:
    """Add a value to a digest. Tensors, arrays and images go in by their bytes: their text leaves most values out."""
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        raw: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found.update(raw)
    elif isinstance(value, np.ndarray) or hasattr(value, "__array_interface__"):
        array = np.asarray(value)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
    elif isinstance(value, Mapping):
        found.update(f"{len(value)} keys;".encode())
        for key, entry in value.items():
            found.update(f"{key!r}:".encode())
            _update(found, entry)
    elif isinstance(value, (list, tuple)):
        if _SIMPLE_TYPES.issuperset(map(type, value)):
            found.update(repr(value).encode())  # lists of tokens are such: one call for all entries is quick
        else:
            found.update(f"{len(value)} entries;".encode())
            for entry in value:
                _update(found, entry)
    elif isinstance(value, (set, frozenset)):
        found.update(repr(sorted(map(repr, value))).encode())  # their order differs from process to process
    elif is_dataclass(value) and not isinstance(value, type):
        _update(found, {field.name: getattr(value, field.name) for field in fields(value)})
    elif getattr(type(value), "__repr__", None) is _DEFAULT_REPR and hasattr(value, "__dict__"):
        _update(found, {"": type(value).__qualname__, **vars(value)})
    else:
        found.update(f"{value!r};".encode())
