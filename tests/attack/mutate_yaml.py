"""Damaged configurations, given to the commands that read them.

No model of these configurations exists, so a command ends when it looks for it: nothing is trained.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from runner import Attack, RefusedError, command

TASKS = [{"train": "a.csv"}, {"name": "other", "train": "b.csv", "validation": "a.csv", "max_train": 9}]
SEARCH: dict[str, Any] = {
    "version": 1,
    "model": "no/model",
    "tasks": TASKS,
    "space": "encoder-mixed",
    "budget": {"fraction": 0.25, "per_task": 0.2},
    "schedule": {"warmup": 0.1, "ramp": 0.3, "prune": 0.5},
    "noise": {"kind": "label", "ratio": 0.1, "seed": 3},
    "training": {"steps": 6, "batch_size": 4, "learning_rate": 0.002, "seed": 1},
    "compare": ["uniform", "random"],
}
SPACE: dict[str, Any] = {
    "version": 1,
    "name": "mine",
    "gates": {"levels": ["path", "rank"], "temperature": 0.7, "init": 2.0},
    "paths": [
        {"kind": "lora", "rank": 4, "at": {"roles": ["q", "v"], "blocks": [0, -1], "include": "layer"}},
        {"kind": "serial", "width": 8, "at": {"sublayers": ["feed_forward"], "exclude": "head$"}},
    ],
}
FILES: dict[str, dict[str, Any]] = {
    "search": SEARCH,
    "inner-space": {**SEARCH, "space": SPACE},
    "select": {
        "model": "no/model",
        "general": {"file": "a.csv", "max_texts": 9},
        "domain": {"file": "b.csv"},
        "selection": {"kind": "taylor", "protect": 0.9, "include": ["q", "*"], "batches": 2},
        "training": {"steps": 3, "batch_size": 2},
    },
    "continual": {
        "model": "no/model",
        "tasks": TASKS,
        "strategy": {"kind": "lora", "rank": 2},
        "compare": ["sequential", {"kind": "ewc", "weight": 10.0}],
        "training": {"steps": 3},
        "seeds": [0, 1],
        "orders": 2,
    },
    "transfer": {
        "model": "no/model",
        "update": "no/update",
        "tasks": TASKS,
        "weakening": {"mask": 0.1, "drop": {"start": 0.0, "end": 0.2}},
        "seeds": [0],
    },
    "study": {
        "name": "mine",
        "search": SEARCH,
        "factors": {
            "penalty.weight": {"low": 0.1, "high": 10, "log": True, "points": 3},
            "noise.ratio": {"values": [0.0, 0.2]},
        },
        "sides": {"gated": {}, "uniform": {}},
        "seeds": [0, 1],
    },
    "tuning": {
        "name": "tuned",
        "mode": "optimise",
        "search": "search.yaml",
        "factors": {"training.learning_rate": {"low": 0.0001, "high": 0.01, "log": True}},
        "trials": 5,
        "objectives": ["score", "params"],
        "constraints": {"params": 5000},
    },
    "space": SPACE,
}
COMMANDS: dict[str, Callable[[str], int]] = {
    "search": lambda file: command("search", file),
    "inner-space": lambda file: command("search", file),
    "select": lambda file: command("select", file),
    "continual": lambda file: command("continual", file),
    "transfer": lambda file: command("transfer", file),
    "study": lambda file: command("report", file),
    "tuning": lambda file: command("report", file),
    "space": lambda file: command("plan", "tiny", file, "--fraction", "0.25"),
}
BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
}

BOMB = "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)
])  # fmt: skip
MERGES = "\n".join(["m0: &m0 {k: v}"] + [f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}" for n in range(1, 25)])
SCALARS = [
    "2024-13-45", "!!int 'x'", "!!timestamp 'x'", "9" * 5000, '"\\U00110000"', "0x" + "f" * 5000, "1" + "0" * 30,
    ".inf", "-.inf", ".nan", "1e400", "-1", "0", "~", "''", "true", "!!binary '%'", "!!set {a, b}", "!!omap [1]",
    "!!python/object/apply:os.system ['true']", "!unknown x", "*nothing", "&a [*a]", "[" * 3000, "{a: " * 3000,
    "- " * 3000, "1:2:3:" + "59:" * 3000 + "1", '"\\0"', "'" + "x" * 100_000 + "'", "2024-01-01", "<<", "=", "0b" +
    "1" * 6000, "!!float '_'", "!!merge x", "? x", "'../../../../etc/passwd'", "/", ".", "/dev/zero", "/dev/null",
    "'(a+)+$'", "'(a|aa)+$'", "'('", "'a{1000000000000}'", "'((a{1000}){1000}){1000}'", "'*'", "'[['",
]  # fmt: skip
VALUES: list[Any] = [
    10**30, -(10**30), 2**31, 2**63, 1e308, float("inf"), float("nan"), -1, 0, 1, "", " ", "x", "\0", "..", "/", "~",
    "a" * 5000, "\ud7ff", "\u202e", None, True, [], {}, [None], [[[]]], {"kind": "x"}, {"": ""}, {1: 2}, ["x"] * 5000,
    {f"k{n}": n for n in range(2000)}, "bundled:", "bundled:../x", "a.csv", "nowhere.csv", "nowhere.parquet",
    "/dev/zero", "search.yaml", "(a|aa)+$", "lora", "sequential", "gated", 0.5, "1e3", "0x10", b"bytes",
    {"fraction": 0.5},
]  # fmt: skip


def prepare(folder: Path) -> None:
    """Write the tables, a model that can be planned, and every configuration; run each once, for what it imports."""
    for name in ("a", "b"):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            rows = [[f"{name} text {n}", "yes" if n % 2 else "no"] for n in range(30)]
            csv.writer(file).writerows([["text", "label"], *rows])
    for name, data in FILES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
    (folder / "tiny").mkdir()
    (folder / "tiny" / "config.json").write_text(json.dumps(BERT))
    with contextlib.chdir(folder):
        for name, run in COMMANDS.items():
            with contextlib.suppress(RefusedError):
                run(f"{name}.yaml")


def attack(chosen: random.Random, valid: Path, folder: Path) -> Attack:
    """Damage one configuration, in its data or in its text, once or a few times."""
    shutil.copytree(valid, folder, dirs_exist_ok=True)
    name = chosen.choice(sorted(FILES))
    changes: list[str] = []
    data = copy.deepcopy(FILES[name])
    kind = chosen.random()
    if kind < 0.5:
        changes += [_damage_data(chosen, data) for _ in range(chosen.choice([1, 1, 1, 2, 4]))]
    text = yaml.dump(data, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    if kind >= 0.45:
        for _ in range(chosen.choice([1, 1, 2, 3])):
            change, text = _damage_text(chosen, text)
            changes.append(change)
    file = folder / f"{name}.yaml"
    file.write_bytes(text)
    return Attack(f"{name}.yaml, {'; '.join(changes)}", lambda: COMMANDS[name](file.name))


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in nested data."""
    if isinstance(data, dict | list):
        for key in list(data) if isinstance(data, dict) else range(len(data)):
            yield data, key
            yield from _places(data[key])


def _damage_data(chosen: random.Random, data: Any) -> str:
    places = list(_places(data))
    if not places:
        return "nothing left to damage"
    at, key = chosen.choice(places)
    kind = chosen.choice(["value", "value", "value", "delete", "rename", "add", "wrap", "move"])
    if kind == "value":
        at[key] = value = copy.deepcopy(chosen.choice(VALUES))
        return f"{key} = {str(value)[:40]!r}"
    if kind == "delete":
        del at[key]
        return f"without {key}"
    if kind == "rename" and isinstance(at, dict):
        other = chosen.choice(["x", "", 1, None, "version", "kind", "core", f"{key}.", str(key).upper()])
        at[other] = at.pop(key)
        return f"{key} renamed {other!r}"
    if kind == "add" and isinstance(at, dict):
        other = chosen.choice(["x", "penalty", "perturbation", "general", "answer", "sides", "compare", "pair", "at"])
        at[other] = copy.deepcopy(chosen.choice(VALUES))
        return f"{other} added"
    if kind == "wrap":
        at[key] = chosen.choice([[at[key]], {"x": at[key]}, [at[key]] * 3, str(at[key])])
        return f"{key} wrapped"
    other, place = chosen.choice(places)
    at[key] = copy.deepcopy(other[place]) if place in (other if isinstance(other, dict) else range(len(other))) else 0
    return f"{key} = what {place} is"


def _damage_text(chosen: random.Random, text: bytes) -> tuple[str, bytes]:
    kind = chosen.choice(
        ["cut", "byte", "bytes", "scalar", "scalar", "scalar", "double line", "drop line", "indent", "bomb", "insert"]
    )
    lines = text.split(b"\n")
    number = chosen.randrange(len(lines))
    at = chosen.randrange(len(text) + 1)
    if kind == "cut":
        return f"cut after {at} bytes", text[:at]
    if kind in {"byte", "bytes"}:
        new = chosen.randbytes(1 if kind == "byte" else 20)
        return f"{new!r} at {at}", text[:at] + new + text[at + len(new) :]
    if kind == "scalar":
        value = chosen.choice(SCALARS)
        head, colon, _ = lines[number].partition(b":")
        lines[number] = head + (colon or b": ") + b" " + value.encode()
        return f"line {number + 1} is {head.decode('utf-8', 'replace').strip()}: {value[:40]}", b"\n".join(lines)
    if kind == "double line":
        lines.insert(number, lines[number])
    elif kind == "drop line":
        del lines[number]
    elif kind == "indent":
        lines[number] = chosen.choice([b" ", b"  ", b"\t", b"- "]) + lines[number]
    elif kind == "bomb":
        bomb = chosen.choice([BOMB, MERGES, BOMB + "\nseeds: *a8", BOMB + "\nfactors: *a8", "&a\n" + BOMB])
        return "an alias bomb", bomb.encode() + b"\n" + text if chosen.random() < 0.5 else text + bomb.encode()
    else:
        piece = chosen.choice(
            [
                b"\x00",
                b"\xff\xfe",
                b"\xef\xbb\xbf",
                b"---\n",
                b"...\n",
                b"%YAML 9.9\n",
                b"\t",
                b"\x1b[31m",
                b"|\n",
                b">",
                b"!!",
            ]
        )
        return f"{piece!r} at {at}", text[:at] + piece + text[at:]
    return f"{kind} {number + 1}", b"\n".join(lines)
