"""Data sets that differ anywhere have other digests, and equal ones the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gatedadapters.continual.digests import data_digest, difference


class Plain:
    """Its text holds its address."""

    def __init__(self, value: int) -> None:
        self.value = value


@dataclass(frozen=True)
class Record:
    vector: torch.Tensor


def image(value: int) -> Image.Image:
    return Image.fromarray(np.full((8, 8), value, np.uint8))


def set_at(index: int, key: str, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda data: data[index].__setitem__(key, value)


def examples() -> list[dict[str, Any]]:
    return [
        {
            "ids": [1, 2, i],
            "pixels": torch.zeros(5000),
            "half": torch.ones(3, dtype=torch.bfloat16),
            "array": np.zeros(5000),
            "image": image(i % 7),
            "nested": ({"a": [torch.zeros(2)]}, None),
            "record": Record(torch.zeros(3)),
            "plain": Plain(i),
            "flags": {"x", "y"},
        }
        for i in range(150)
    ]


CHANGES = {
    "token": set_at(149, "ids", [1, 2, 0]),
    "pixel": lambda data: data[77]["pixels"].__setitem__(2500, 1e-20),
    "half": lambda data: data[1]["half"].__setitem__(1, 2),
    "array": lambda data: data[3]["array"].__setitem__(2500, -0.0),
    "image": set_at(5, "image", image(200)),
    "nested": lambda data: data[9]["nested"][0]["a"][0].__setitem__(0, 1),
    "record": set_at(8, "record", Record(torch.ones(3))),
    "object": set_at(8, "plain", Plain(-1)),
    "set": set_at(8, "flags", {"x"}),
    "key": lambda data: data[8].__setitem__("more", None),
    "type": set_at(3, "pixels", torch.zeros(5000, dtype=torch.int32)),
    "one less": lambda data: data.pop(),
    "order": lambda data: data.reverse(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_of_any_example_is_seen(change: str) -> None:
    data = copy.deepcopy(examples())
    was = data_digest(examples())
    assert data_digest(data) == was
    CHANGES[change](data)
    assert data_digest(data) != was


def test_what_differs_between_records_is_named() -> None:
    assert difference({"a": 1, "b": {"c": [1, 2]}}, {"a": 1, "b": {"c": [1, 3]}}) == (".b.c[1]", "2", "3")
    one, other = {"name": "one", "size": 3}, {"train": "other.csv"}
    assert difference({"tasks": [one, other]}, {"tasks": [other, one]}) == (
        ".tasks (order)",
        "one, other.csv",
        "other.csv, one",
    )
    assert difference([one], [{**one, "size": 4}]) == ("[0].size", "3", "4")
    assert difference([one], [one, other]) == ("", "one", "one, other.csv")
    assert difference({}, {"keep": False}) == (".keep", "null", "false")
    assert difference({"a": 1}, {"a": 1, "b": None}) == (".b", "nothing", "null")
