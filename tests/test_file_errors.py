"""What the file system refuses is told in words: what, where, what to do. Nothing half-written stays."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

import gatedadapters as ga
from gatedadapters.cli import main
from gatedadapters.cli.main import COMMANDS
from gatedadapters.errors import FileAccessError, GatedAdaptersError
from gatedadapters.safe_files import check_writable, file_errors, write_text
from gatedadapters.testing.backbones import tiny

FullDisk = Callable[[int], AbstractContextManager[None]]


def adapted() -> ga.Adapters:
    model, _ = tiny("bert")
    adapters = ga.attach(model, "lora-all-linear")
    adapters.compact(adapters.discretize())
    return adapters


def masked() -> ga.Mask:
    model, _ = tiny("bert")
    return ga.select(ga.score(model, None, kind="magnitude"), protect=0.9)


def delta() -> ga.SparseDelta:
    model, _ = tiny("bert")
    return ga.apply_mask(model, masked())


SAVES: dict[str, Callable[[Path], object]] = {
    "adapters": lambda folder: adapted().save(folder),
    "peft": lambda folder: ga.export_peft(adapted(), folder),
    "mask": lambda folder: masked().save(folder),
    "scores": lambda folder: ga.score(tiny("bert")[0], None, kind="magnitude").save(folder),
    "delta": lambda folder: delta().save(folder),
    "text": lambda folder: write_text(folder, "x" * 5000),
}


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Nobody's rights: root may write everywhere."""
    if os.geteuid() == 0:
        os.seteuid(65534)
    yield
    if os.getuid() == 0:
        os.seteuid(0)


@pytest.mark.parametrize("name", SAVES)
def test_a_save_on_a_full_disk_says_so_and_leaves_nothing(name: str, tmp_path: Path, full_disk: FullDisk) -> None:
    with full_disk(1000), pytest.raises(FileAccessError, match=r"(?s)cannot write.*where:.*fix:") as caught:
        SAVES[name](tmp_path / "out")
    assert "out" in str(caught.value.where)
    assert not list(tmp_path.iterdir())
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize("name", SAVES)
def test_a_save_without_permission_says_so(name: str, tmp_path: Path, unprivileged: None) -> None:
    folder = Path("/") / "no-permission" if os.getuid() == 0 else tmp_path / "closed" / "out"
    if os.getuid() != 0:
        folder.parent.mkdir(mode=0o500)
    with pytest.raises(FileAccessError, match=r"(?s)cannot write.*Permission denied.*where:.*change its rights"):
        SAVES[name](folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_command_on_a_full_disk_ends_with_code_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapted().save(tmp_path / "adapter")
    assert main(["show", str(tmp_path / "adapter"), "--png", "/dev/full"]) == 2
    message = capsys.readouterr().err
    for part in ("FileAccessError", "No space left", "where:", "/dev/full", "free some space"):
        assert part in message


def test_an_error_of_the_file_system_in_any_command_ends_with_code_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO, errno.EMFILE):

        def fail(options: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number), "some/file")

        monkeypatch.setattr(COMMANDS[-1], "run", fail)
        assert main(["show", "anything"]) == 2
        message = capsys.readouterr().err
        for part in (os.strerror(number), "some/file", "fix:"):
            assert part in message


@pytest.mark.parametrize("load", [ga.Structure.load, ga.Mask.load, ga.SearchSpace.load, ga.import_peft])
def test_a_load_without_permission_says_so(load: Callable[..., object], tmp_path: Path, unprivileged: None) -> None:
    closed = tmp_path / "closed.yaml"  # pytest's folders are closed to others
    given = (tiny("bert")[0], closed) if load is ga.import_peft else (closed,)
    with pytest.raises(GatedAdaptersError, match=r"(?s)where:.*fix:"):
        load(*given)


def test_an_output_folder_is_tried_before_anything_is_computed(tmp_path: Path, full_disk: FullDisk) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileAccessError, match="Not a directory"):
        check_writable(tmp_path / "file" / "out")
    with full_disk(0), pytest.raises(FileAccessError, match="File too large"):
        check_writable(tmp_path / "new" / "out")
    check_writable(tmp_path / "new" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_errors_of_writers_are_errors_of_the_file_system_and_others_stay(tmp_path: Path, full_disk: FullDisk) -> None:
    with full_disk(100), pytest.raises(FileAccessError), file_errors("write", tmp_path):
        torch.save(torch.zeros(9999), tmp_path / "x.pt")
    with pytest.raises(RuntimeError, match="mine"), file_errors("write", tmp_path):
        raise RuntimeError("mine")
