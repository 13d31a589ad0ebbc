"""What tells two runs apart: digests of data sets by every value of every example, and where two records differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ADDRESS: Any = object.__repr__  # a text that is another in every process
_ABSENT = object()
_PLAIN = frozenset({bool, int, float, str, bytes, type(None)})


def data_digest(*parts: Any) -> str:
    """Of every item of some data sets with `len` and integer indices."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(f"{len(part)} items;".encode())
        for index in range(len(part)):
            _add(found, part[index])
    return found.hexdigest()


def difference(earlier: Any, mine: Any) -> tuple[str, str, str]:
    """Where two records first differ, as `.key[0]`, and what each holds there."""
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
    """The name of a task, or whatever else is in a list."""
    keys = [key for key in ("name", "train", "bundled") if entry.get(key)] if isinstance(entry, dict) else []
    return str(entry[keys[0]]) if keys else json.dumps(entry)


def _add(found: Any, value: Any) -> None:
    """Tensors, arrays and images by their bytes, for their text leaves most of them out."""
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
            _add(found, entry)
    elif isinstance(value, (list, tuple)):
        if _PLAIN.issuperset(map(type, value)):
            found.update(repr(value).encode())  # most of what tokens are: one call for all of them
        else:
            found.update(f"{len(value)} entries;".encode())
            for entry in value:
                _add(found, entry)
    elif isinstance(value, (set, frozenset)):
        found.update(repr(sorted(map(repr, value))).encode())  # their order is another in every process
    elif is_dataclass(value) and not isinstance(value, type):
        _add(found, {field.name: getattr(value, field.name) for field in fields(value)})
    elif getattr(type(value), "__repr__", None) is _ADDRESS and hasattr(value, "__dict__"):
        _add(found, {"": type(value).__qualname__, **vars(value)})
    else:
        found.update(f"{value!r};".encode())
