"""What is done many times takes no more memory, what is killed loses nothing, and data loaders may have workers."""

from __future__ import annotations

import copy
import os
import time
from pathlib import Path
from typing import Any

import kills
import long_runs
import processes
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import gatedadapters as ga
from gatedadapters import safe_files
from gatedadapters.errors import ArtifactError
from gatedadapters.testing import tiny


@pytest.mark.slow
def test_kills_lose_nothing_and_leave_nothing(tmp_path: Path) -> None:
    number = int(os.environ.get("ATTACK_KILLS", "10"))
    printed = processes.run(_report, kills.run, number, log=tmp_path / "log")
    assert printed.count("kills, 0 faults") == len(kills.SCENARIOS), printed
    assert "faults: 0" in printed


@pytest.mark.slow
def test_what_is_repeated_leaves_nothing_behind(tmp_path: Path) -> None:
    printed = processes.run(_report, long_runs.run, 60, log=tmp_path / "log")
    assert printed.count("in the second half") == len(long_runs.LOOPS)
    assert "faults: 0" in printed, printed


def _report(function: Any, number: int) -> None:
    print("faults:", function(number))


def test_the_next_save_removes_what_dead_processes_left_and_nothing_else(tmp_path: Path) -> None:
    dead, foreign, link = (tmp_path / f".out.{digit * 8}" for digit in "123")
    for folder, name in ((dead, "a"), (dead, ".tmpA1b2"), (foreign, "thesis.tex")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".out.original").mkdir()  # eight characters, but not ours
    with safe_files.whole_folder(tmp_path / "out", files={"a"}) as living:
        with safe_files.whole_folder(tmp_path / "out", files={"a"}) as other:
            (other / "a").write_text("other")
        assert living.is_dir()
        assert not dead.exists()
        (tmp_path / "out" / "a").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [foreign.name, link.name, ".out.original", "elsewhere", "out"]
    )


def test_a_small_file_that_was_half_written_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".r.json.0123abcd").write_text("{")
    safe_files.write_text(tmp_path / "r.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_folder_has_one_user_whatever_workers_it_forks(tmp_path: Path) -> None:
    with safe_files.sole_user(tmp_path, what="stream"):
        told = pytest.raises(ArtifactError, match=r"another process is writing this stream[\s\S]*wait")
        with told, safe_files.sole_user(tmp_path, what="stream"):
            pass
        ready = os.pipe()
        child = os.fork()  # as data loaders do
        if not child:
            os.write(ready[1], b"1")  # Python lets go of inherited locks before os.fork returns here
            time.sleep(30)
            os._exit(0)
        os.read(ready[0], 1)
    try:
        with safe_files.sole_user(tmp_path, what="stream"):
            pass  # the worker lives, and does not hold the folder
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


class Rows(Dataset[dict[str, torch.Tensor]]):
    """A few rows that draw random numbers of their own, as augmentation does."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 90, (6,), generator=generator)
        return {"input_ids": ids, "labels": torch.tensor(index % 3)}


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_workers_of_data_loaders_change_nothing(how: str) -> None:
    def trained(**options: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model, _ = tiny("bert", head="classification", num_hidden_layers=1)
        space = ga.SearchSpace.parse({"name": "small", "paths": [{"kind": "lora", "rank": 2}]}, where="test")
        adapters = ga.attach(model.train(), space, penalty=ga.L0(weight=0.1))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for batch in DataLoader(Rows(), 4, **options):
            (model(**batch).loss + adapters.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
        return copy.deepcopy(model.state_dict())

    alone = trained()
    found = trained(num_workers=1, multiprocessing_context=how)
    assert all(torch.equal(value, found[name]) for name, value in alone.items())
