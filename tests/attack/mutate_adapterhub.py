"""Damaged folders of AdapterHub, as the adapters library wrote them, given to `import_adapterhub`.

They hold no digests: what is accepted may compute anything, but has to run. What is refused must leave the model as it
was.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damage
import torch
from mutate_artefacts import read_and_undo
from runner import Attack
from torch import nn

import gatedadapters as ga

ARTIFACTS = Path(__file__).parents[1] / "artifacts"
sys.path.append(str(ARTIFACTS))

from test_import_adapterhub import model_for  # noqa: E402 (found on the path above)

FOLDERS = ARTIFACTS / "adapterhub"
UNREAD = ("expected.safetensors",)  # beside the folder's own files, for the tests


def prepare(folder: Path) -> None:
    """Copy the folders of every family and kind, and read each as it is."""
    for case in FOLDERS.iterdir():
        shutil.copytree(case, folder / case.name, ignore=shutil.ignore_patterns(*UNREAD))
        read_and_undo(model_for(case.name), _read, folder / case.name)  # also imports what models need, once


def attack(chosen: random.Random, valid: Path, folder: Path) -> Attack:
    """Damage one file of a folder."""
    names = sorted(case.name for case in valid.iterdir())
    name, other = chosen.choice(names), chosen.choice(names)
    where = folder / name
    shutil.copytree(valid / name, where)
    if chosen.random() < 0.2:
        shutil.copytree(valid / name, folder / "other")
        for file in (valid / other).iterdir():
            shutil.copyfile(file, folder / "other" / file.name)
        what = damage.damage_folder(chosen, where, folder / "other")
    else:
        file = chosen.choice(sorted(path for path in where.iterdir() if path.suffix in (".json", ".safetensors")))
        what = (damage.damage_json if file.suffix == ".json" else damage.damage_tensors)(chosen, file)
    return Attack(f"{name}, {what}", lambda: read_and_undo(model_for(name), _read, where))


def _read(model: Any, folder: Path) -> tuple[Any, Callable[[], nn.Module]]:
    adapters = ga.import_adapterhub(model, folder)
    with torch.no_grad():
        return model(input_ids=torch.arange(12).reshape(2, 6))[0], adapters.detach
