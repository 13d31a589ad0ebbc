"""A folder appears whole or not at all, and what stood there before is never lost."""

from __future__ import annotations

import sys
from pathlib import Path

import processes
import pytest

from gatedadapters import safe_files
from gatedadapters.errors import ArtifactError
from gatedadapters.safe_files import leftovers, whole_folder

FILES = frozenset({"a", "b"})


def write(folder: Path, text: str, *, overwrite: bool = False) -> None:
    with whole_folder(folder, files=FILES, overwrite=overwrite) as new:
        for name in sorted(FILES):
            (new / name).write_text(text)


def read(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def test_a_new_an_empty_and_a_nested_folder_are_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "deep/er"):
        write(tmp_path / name, "1")
        assert read(tmp_path / name) == {"a": "1", "b": "1"}
        assert leftovers(tmp_path / name) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "empty", "new"]


def test_an_artefact_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    with pytest.raises(
        ArtifactError, match=r"already holds[\s\S]*a new or an empty[\s\S]*a, b[\s\S]*overwrite=True, .*--overwrite"
    ):
        write(tmp_path / "out", "new")
    assert read(tmp_path / "out") == {"a": "old", "b": "old"}
    write(tmp_path / "out", "new", overwrite=True)
    assert read(tmp_path / "out") == {"a": "new", "b": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_one_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"
    (disk / "out").mkdir(parents=True)
    link.symlink_to(disk / "out", target_is_directory=True)
    for text in ("old", "new"):
        write(link, text, overwrite=text == "new")
        assert link.is_symlink()
        assert read(disk / "out") == {"a": text, "b": text}
    assert [path.name for path in disk.iterdir()] == ["out"]
    (disk / ".out.01234567").mkdir()
    assert leftovers(link) == [disk / ".out.01234567"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_others_are_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"do not belong[\s\S]*thesis.tex[\s\S]*a folder of its own"):
        write(tmp_path / "out", "new", overwrite=overwrite)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="a file is in the way"):
        write(tmp_path / "file", "new", overwrite=overwrite)
    assert read(tmp_path / "out") == {"thesis.tex": "years of work"}


def test_a_failure_while_writing_leaves_everything_as_it_was(tmp_path: Path) -> None:
    def fail(folder: Path, *, overwrite: bool) -> None:
        with whole_folder(folder, files=FILES, overwrite=overwrite) as new:
            (new / "a").write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail(tmp_path / "out", overwrite=False)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "out", "old")
    with pytest.raises(OSError, match="disk full"):
        fail(tmp_path / "out", overwrite=True)
    assert read(tmp_path / "out") == {"a": "old", "b": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_somebody_who_was_faster_is_not_overwritten(tmp_path: Path) -> None:
    slow = whole_folder(tmp_path / "out", files=FILES)
    (slow.__enter__() / "a").write_text("late")
    write(tmp_path / "out", "early")
    with pytest.raises(ArtifactError, match="already holds"):
        slow.__exit__(None, None, None)
    assert read(tmp_path / "out") == {"a": "early", "b": "early"}


@pytest.mark.parametrize("text", ["same", "other"])
def test_of_those_who_write_together_the_first_wins_and_only_other_files_are_an_error(
    tmp_path: Path, text: str
) -> None:
    slow = whole_folder(tmp_path / "out", files=FILES, together=True)
    new = slow.__enter__()
    for name in FILES:
        (new / name).write_text(text)
    write(tmp_path / "out", "same")
    if text == "same":
        slow.__exit__(None, None, None)
    else:
        with pytest.raises(ArtifactError, match="already holds"):
            slow.__exit__(None, None, None)
    assert read(tmp_path / "out") == {"a": "same", "b": "same"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, sys, types
from pathlib import Path
import gatedadapters.safe_files as files

system, folder = sys.argv[1], Path(sys.argv[2])
if system == "renames":
    files.ctypes = types.SimpleNamespace(CDLL=lambda name: object())  # a system without exchange

def write(text):
    with files.whole_folder(folder, files={"a", "b"}, overwrite=True) as new:
        (new / "a").write_text(text)
        (new / "b").write_text(text)

def until_call(number):
    '''Die as by SIGKILL at the system call of that number.'''
    left = [number]
    def dying(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return function(*args, **kwargs)
        return call
    for name in ("rename", "fsync", "open"):
        setattr(files.os, name, dying(getattr(os, name)))
    files._exchange = dying(files._exchange)
    files.shutil.rmtree = dying(files.shutil.rmtree)

write("old")
for number in range(100):
    child = os.fork()
    if not child:
        until_call(number)
        write("new")
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = {p.name: p.read_text() for p in folder.iterdir()} if folder.is_dir() else None
    whole = ({"a": "old", "b": "old"}, {"a": "new", "b": "new"})
    hidden = [{p.name: p.read_text() for p in left.iterdir()} for left in files.leftovers(folder)]
    seen = "gone" if found is None else found["a"] if found in whole else "torn"
    print(number, status, seen, whole[0] in hidden)
    for left in files.leftovers(folder):
        files.shutil.rmtree(left)
    if found != whole[0]:
        if found is not None:
            files.shutil.rmtree(folder)
        write("old")
    if status == 0:
        break
"""


@pytest.mark.parametrize("system", ["exchange", "renames"])
def test_a_killed_overwrite_loses_nothing(tmp_path: Path, system: str) -> None:
    if system == "exchange" and not sys.platform.startswith("linux"):
        pytest.skip("needs renameat2")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    printed = processes.run(processes.script, script, system, str(tmp_path / "out"), log=tmp_path / "log")
    outcomes = [line.split() for line in printed.splitlines()]
    assert len(outcomes) > 5
    assert outcomes[-1][1:3] == ["0", "new"]
    for _, status, seen, old_is_beside in outcomes[:-1]:
        assert status == "9"
        if system == "exchange":
            assert seen in {"old", "new"}
        else:
            assert seen in {"old", "new"} or (seen == "gone" and old_is_beside == "True")


def test_loading_points_at_what_an_interrupted_save_left(tmp_path: Path) -> None:
    import gatedadapters as ga
    from gatedadapters.testing.backbones import tiny

    hidden = tmp_path / ".out.0123abcd"
    hidden.mkdir()
    (hidden / "structure.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"interrupted save left .*\.out\.0123abcd: rename it"):
        ga.load_adapters(tiny("bert")[0], tmp_path / "out")
    assert safe_files.leftovers(tmp_path / "nowhere" / "x") == []


@pytest.mark.parametrize("existing", [False, True])
def test_of_two_who_write_one_folder_one_wins_and_the_other_is_told(existing: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"

    def write(text: str) -> None:
        with whole_folder(target, files={"a"}, overwrite=True) as new:
            (new / "a").write_text(text)

    if existing:
        write("before")

    def write_slowly() -> None:
        with whole_folder(target, files={"a"}, overwrite=True) as slow:
            (slow / "a").write_text("slow")
            write("quick")

    with pytest.raises(ArtifactError, match="another process has written this folder meanwhile"):
        write_slowly()
    assert (target / "a").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    write("next")
    assert (target / "a").read_text() == "next"
