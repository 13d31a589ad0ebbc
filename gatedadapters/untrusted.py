"""Reads YAML and JSON that others wrote, within limits.

A small file can ask for much: an alias in YAML stands for a copy of any size, and nesting exhausts the stack. What is
read here either becomes plain data of a moderate size, or is refused with a `ValueError` that says where. Callers turn
it into an error of their own.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import accumulate
from typing import Any

import yaml

MOST_DEPTH = 64  # levels of nesting; configurations and records use about eight
MOST_YAML_BYTES = 2**18  # the largest preset takes 2 KiB
MOST_YAML_VALUES = 20_000  # after every alias is replaced by what it stands for
_WHOLE = 2**63  # whole numbers beyond it fit no tensor, and their text can be longer than Python prints

_TAG = "tag:yaml.org,2002:"
_NOT_PLAIN = frozenset({"binary", "omap", "pairs", "set", "timestamp"})
_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast
_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)
_NO_SIGNS = bytes(set(range(256)) - set(b'[]{}"\\'))
_DIGITS = bytes(ord("0") if chr(byte).isdecimal() else ord(" ") for byte in range(256))


def load_yaml(text: str) -> Any:
    """The plain data of one YAML document.

    Raises:
        ValueError: it is no YAML, has more than one document, a tag that is not plain data, a value that its tag does
            not allow, a key twice, or it is larger or nested deeper than the limits of this module. The message names
            the line.
    """
    if len(text) > MOST_YAML_BYTES:
        raise ValueError(f"{len(text):,} characters; at most {MOST_YAML_BYTES:,} are read")
    try:
        _check_yaml_size(text)
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        raise ValueError(_short(str(error))) from error


def load_json(text: str | bytes) -> Any:
    """The plain data of a JSON document of a record or a configuration.

    Raises:
        ValueError: it is no JSON or no UTF-8, has a key twice or a whole number beyond 64 bits, or is nested deeper
            than the limit of this module.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    check_json_depth(text)
    digits = text.encode(errors="replace").translate(_DIGITS)
    parse_int = _whole_number if b"0" * 19 in digits else None  # shorter numbers are below 2**63
    return json.loads(text, object_pairs_hook=_distinct_keys, parse_int=parse_int)


def check_json_depth(text: str) -> None:
    """Check how deep a JSON text is nested, before it is parsed.

    Raises:
        ValueError: deeper than the limit of this module.
    """
    if text.count("[") + text.count("{") <= MOST_DEPTH:
        return
    bare = text.encode(errors="replace").translate(None, _NO_SIGNS).replace(b'""', b"")
    if not bare.translate(None, b"[]{}"):  # no brackets in strings, no escaped quotes: a tenth of the time
        deepest = max(accumulate(1 if sign in b"[{" else -1 for sign in bare))
        if deepest <= MOST_DEPTH:
            return
    depth = 0
    for token in _BRACKETS.finditer(text):
        first = text[token.start()]
        depth += (first in "[{") - (first in "]}")
        if depth > MOST_DEPTH:
            raise ValueError(f"nested deeper than {MOST_DEPTH} levels, at character {token.start():,}")


class _PlainLoader(_BASE):  # type: ignore[misc]
    """PyYAML's safe loader, which also refuses keys that stand twice and values that their tag does not allow."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind in _NOT_PLAIN:
            raise _error_at(node, f"a {kind}, which no configuration has; put quotes around it if it is text")
        try:
            found = super().construct_object(node, deep=deep)
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, OverflowError, RecursionError) as error:
            raise _error_at(node, f"this is no {kind}: {_short(str(node.value))} ({_short(str(error))})") from None
        if isinstance(found, int) and abs(found) >= _WHOLE:
            raise _error_at(node, "a whole number beyond 64 bits")
        return found

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            twice = [text for (tag, text), times in Counter(keys).items() if times > 1 and tag != f"{_TAG}merge"]
            if twice:
                raise _error_at(node, f"the key {_short(twice[0])!r} stands twice")
        return super().construct_mapping(node, deep=deep)


def _error_at(node: Any, problem: str) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _check_yaml_size(text: str) -> None:
    """Check depth and size of a YAML text, as its aliases make them, from its events alone: nothing is built."""
    sizes: dict[str, tuple[int, int]] = {}  # (values, depth) of what an anchor names
    open_: list[list[Any]] = [[None, 0, 0]]  # [anchor, values, depth below] of every collection that is open
    for event in yaml.parse(text, Loader=_BASE):
        if isinstance(event, yaml.CollectionStartEvent):
            open_.append([event.anchor, 1, 0])
            if event.anchor is not None:
                sizes.pop(event.anchor, None)
            values, depth = 0, 0
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values, depth = open_.pop()
            depth += 1
            if anchor is not None:
                sizes[anchor] = values, depth
        elif isinstance(event, yaml.ScalarEvent):
            values, depth = 1, 0
            if event.anchor is not None:
                sizes[event.anchor] = 1, 0
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                what = "itself" if any(part[0] == event.anchor for part in open_) else "nothing"
                raise _error_at(event, f"the alias {_short(str(event.anchor))!r} stands for {what}")
            values, depth = sizes[event.anchor]
        else:
            continue
        open_[-1][1] += values
        open_[-1][2] = max(open_[-1][2], depth)
        if open_[-1][1] > MOST_YAML_VALUES:
            raise _error_at(event, f"more than {MOST_YAML_VALUES:,} values, with all aliases replaced")
        if len(open_) + depth > MOST_DEPTH:
            raise _error_at(event, f"nested deeper than {MOST_DEPTH} levels")


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
        raise ValueError(f"the key {_short(twice)!r} stands twice")
    return found


def _whole_number(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= _WHOLE:
        raise ValueError(f"a whole number beyond 64 bits: {_short(digits)}")
    return int(digits)


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
