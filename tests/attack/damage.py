"""Damages the files of a saved artefact: JSON, safetensors, and the folder itself. A seed names what is done."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

VALUES: list[Any] = [
    10**30, 2**63, 2**40, 2**31, -1, 0, 1, 3, 0.5, 1e308, float("inf"), float("nan"), "", " ", "no", "1", "x" * 5000,
    "..", "../../etc/passwd", "/etc/passwd", "/dev/zero", "\0", "\ud800", "(a|aa)+$", "(", ".*", None, True, False, [],
    {}, [None], [[[]]], {"": ""}, {"kind": "x"}, ["x"] * 3000, "gated_adapters", "sparse_delta.tuned", "__class__",
    "forward", "lora", "gaps8", "bits", "U8", "F32", "BF16", "F16", "I64", "F64", "block-crc32:00", "sha256:00",
]  # fmt: skip
TEXTS = [
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"NaN", b"1e999", b"-", b'"',
    b",", b"}", b"//", b'"version": 1, ', b"\\ud800",
]  # fmt: skip
IN_TENSORS = [
    "bit", "bit", "bit", "zeros", "cut", "append", "length", "header", "header", "header", "header text", "not finite",
    "swap", "drop", "add", "pickled", "metadata",
]  # fmt: skip
IN_FOLDERS = [
    "removed", "empty", "a folder", "a pipe", "a link out", "a link to itself", "a link to a device", "one beside it",
    "from another artefact", "all but one from another", "one more file", "renamed", "linked inside",
]  # fmt: skip
TYPES = ["F32", "F16", "BF16", "F64", "I8", "U8", "I16", "I32", "I64", "BOOL", "F8_E4M3", "C64", "X", ""]


def damage_json(chosen: random.Random, file: Path) -> str:
    """Change a JSON file in its data or in its text."""
    if chosen.random() < 0.35:
        return damage_text(chosen, file)
    data = json.loads(file.read_text(encoding="utf-8"))
    what = "; ".join(_damage_data(chosen, data) for _ in range(chosen.choice([1, 1, 1, 2, 3])))
    file.write_text(json.dumps(data), encoding="utf-8")
    return f"{file.name}: {what}"


def damage_text(chosen: random.Random, file: Path) -> str:
    """Change the bytes of a text: cut it, change a byte or a digit, insert something, repeat a line."""
    text = file.read_bytes()
    at = chosen.randrange(len(text) + 1)
    kind = chosen.choice(["cut", "byte", "digit", "insert", "line", "key twice"])
    if kind == "cut":
        text = text[:at]
    elif kind == "byte":
        text = text[:at] + chosen.randbytes(1) + text[at + 1 :]
    elif kind == "digit":
        digits = [i for i, byte in enumerate(text) if byte in b"0123456789"]
        at = chosen.choice(digits)
        text = text[:at] + str(chosen.randrange(10)).encode() + text[at + 1 :]
    elif kind == "insert":
        text = text[:at] + chosen.choice(TEXTS) + text[at:]
    elif kind == "line":
        lines = text.split(b"\n")
        at = chosen.randrange(len(lines))
        lines.insert(at, lines[at])
        text = b"\n".join(lines)
    else:
        key = chosen.choice(list(json.loads(text)))
        text = text.rstrip().removesuffix(b"}") + f", {json.dumps(key)}: {json.dumps(chosen.choice(VALUES))}}}".encode()
    file.write_bytes(text)
    return f"{file.name}: {kind} at {at}"


def damage_tensors(chosen: random.Random, file: Path) -> str:
    """Change a safetensors file: bits of the values, the header, names, types, shapes, or which tensors it holds."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    start, at = 8 + length, chosen.randrange(len(raw))
    kind = chosen.choice(IN_TENSORS)
    if kind == "bit" and len(raw) > start:
        at = chosen.randrange(start, len(raw))
        changed = bytearray(raw)
        changed[at] ^= 1 << chosen.randrange(8)
        file.write_bytes(changed)
    elif kind == "zeros" and len(raw) > start:
        at = chosen.randrange(start, len(raw))
        file.write_bytes(raw[:at] + bytes(len(raw[at : at + 64])) + raw[at + 64 :])
    elif kind == "cut":
        file.write_bytes(raw[:at])
    elif kind == "append":
        file.write_bytes(raw + chosen.randbytes(chosen.choice([1, 8, 1000])))
    elif kind == "length":
        new = chosen.choice([0, 1, length - 1, length + 1, length * 2, 2**31, 2**62, 2**64 - 1])
        file.write_bytes(new.to_bytes(8, "little") + raw[8:])
    elif kind == "header":
        header = json.loads(raw[8:start])
        what = _damage_header(chosen, header)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])
        return f"{file.name}: {what}"
    elif kind == "header text":
        at = chosen.randrange(8, start)
        file.write_bytes(raw[:at] + chosen.randbytes(1) + raw[at + 1 :])
    elif kind == "pickled":
        file.write_bytes(chosen.choice([b"\x80\x04]q\x00.", b"PK\x03\x04", b"\x80\x02}q\x00."]) + raw)
    else:
        return f"{file.name}: {_damage_set(chosen, file, kind)}"
    return f"{file.name}: {kind} at {at}"


def damage_folder(chosen: random.Random, folder: Path, other: Path) -> str:
    """Remove, replace, link or exchange a file of an artefact.

    Args:
        chosen: makes the choices.
        folder: of the artefact.
        other: a folder of the same layout with another content.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    file = chosen.choice(files)
    name = file.relative_to(folder)
    kind = chosen.choice(IN_FOLDERS)
    if kind == "one more file":
        (folder / chosen.choice(["x.bin", ".hidden", "adapter_model.bin", "structure.json.bak"])).write_bytes(
            b"\x80\x04."
        )
    elif kind == "all but one from another":
        for path in files:
            if path != file:
                shutil.copyfile(other / path.relative_to(folder), path)
    elif kind == "linked inside":
        aside = file.with_name(f"{file.name}.real")
        file.rename(aside)
        file.symlink_to(aside.name)
    elif kind == "one beside it":
        shutil.copyfile(chosen.choice(files), aside := file.with_name("aside"))
        aside.replace(file)
    else:
        file.unlink()
        if kind == "empty":
            file.touch()
        elif kind == "a folder":
            file.mkdir()
        elif kind == "a pipe":
            os.mkfifo(file)
        elif kind == "a link out":
            file.symlink_to(
                chosen.choice(["/etc/passwd", "../../valid/adapters/structure.json", "/nowhere", str(other / name)])
            )
        elif kind == "a link to itself":
            file.symlink_to(file.name)
        elif kind == "a link to a device":
            file.symlink_to(chosen.choice(["/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem"]))
        elif kind == "from another artefact":
            shutil.copyfile(other / name, file)
        elif kind == "renamed":
            file.with_name(f"_{file.name}").touch()
    return f"{name} {kind}"


def without_digests(folder: Path) -> None:
    """Take the digests out of every record, as an attacker can, or as releases before 0.3 wrote them."""
    for file in folder.rglob("*.json"):
        data = json.loads(file.read_text(encoding="utf-8"))
        if data.pop("digests", None) is not None:
            file.write_text(json.dumps(data), encoding="utf-8")
    for file in folder.rglob("adapter_model.safetensors"):
        save_file(load_file(file), file)


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in nested data."""
    if isinstance(data, dict | list):
        for key in list(data) if isinstance(data, dict) else range(len(data)):
            yield data, key
            yield from _places(data[key])


def _damage_data(chosen: random.Random, data: Any) -> str:
    places = list(_places(data))
    if not places:
        return "nothing left"
    at, key = chosen.choice(places)
    kind = chosen.choice(["value", "value", "value", "near", "near", "delete", "rename", "add", "wrap", "move"])
    if kind == "value":
        at[key] = copy.deepcopy(chosen.choice(VALUES))
        return f"{key} = {str(at[key])[:40]!r}"
    if kind == "near" and isinstance(at[key], int | float):
        at[key] = chosen.choice([at[key] + 1, at[key] - 1, at[key] * 2, -at[key], float(at[key]), str(at[key])])
        return f"{key} = {at[key]!r:.40}"
    if kind == "delete":
        del at[key]
        return f"without {key}"
    if kind == "rename" and isinstance(at, dict):
        new = chosen.choice(["x", "", "version", "kind", "..", f"{key}.", str(key).upper(), "digests", "é"])
        at[new] = at.pop(key)
        return f"{key} renamed {new!r}"
    if kind == "add" and isinstance(at, dict):
        new = chosen.choice(
            ["x", "lineage", "budget", "heads", "rank_pattern", "use_dora", "bias", "digests", "version"]
        )
        at[new] = copy.deepcopy(chosen.choice(VALUES))
        return f"{new} added"
    if kind == "wrap":
        at[key] = chosen.choice([[at[key]], {"x": at[key]}, [at[key]] * 3, str(at[key])])
        return f"{key} wrapped"
    other, place = chosen.choice(places)
    inside = place in other if isinstance(other, dict) else place < len(other)
    at[key] = copy.deepcopy(other[place]) if inside else 0
    return f"{key} = what {place} is"


def _damage_header(chosen: random.Random, header: dict[str, Any]) -> str:
    names = [name for name in header if name != "__metadata__"]
    if not names:
        header["x"] = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
        return "a tensor without data"
    name = chosen.choice(names)
    entry = header[name]
    kind = chosen.choice(["dtype", "dtype", "shape", "offsets", "name", "drop", "field", "metadata"])
    if kind == "dtype":
        entry["dtype"] = chosen.choice(TYPES)
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = chosen.choice(
            [shape[::-1], [*shape, 1], [2**40] * 3, [-1], [], [2**63], [0], "x", None, [1.5]]
        )
    elif kind == "offsets":
        first, last = entry["data_offsets"]
        entry["data_offsets"] = chosen.choice(
            [[first + 1, last + 1], [last, first], [0, 2**62], [-1, last], [first, last - 4], [first], "x"]
        )
    elif kind == "name":
        header[chosen.choice(["", "../x", "x" * 5000, "\0", "__metadata__", f"{name}.", chosen.choice(names)])] = (
            header.pop(name)
        )
    elif kind == "drop":
        del header[name]
    elif kind == "field":
        entry[chosen.choice(["x", "dtype", "data_offsets"])] = chosen.choice(VALUES)
    else:
        header["__metadata__"] = chosen.choice([None, [], {"a": 1}, {"digest": "x"}, {"backbone": "y", "format": "pt"}])
    return f"header, {kind} of {name[:60]}"


def _damage_set(chosen: random.Random, file: Path, kind: str) -> str:
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        written = opened.metadata()  # digests, too: they must tell what became of the tensors
    name = chosen.choice(sorted(tensors)) if tensors else ""
    if kind == "not finite" and tensors and tensors[name].is_floating_point() and tensors[name].numel():
        tensors[name].view(-1)[chosen.randrange(tensors[name].numel())] = float(chosen.choice(["nan", "inf", "-inf"]))
    elif kind == "swap" and tensors:
        other = chosen.choice(sorted(tensors))
        tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
    elif kind == "drop" and tensors:
        del tensors[name]
    elif tensors:
        tensors[chosen.choice(["x", "..", f"{name}.x", "paths.smuggled", ""])] = tensors[name].clone()
    save_file(tensors, file, metadata=written if kind != "metadata" else {"digest": "crc32:0", "x": "y"})
    return f"{kind} {name[:60]}"
