from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

from gatedadapters import errors

CLASSES = [getattr(errors, name) for name in errors.__all__]


def test_messages_say_expected_got_where_and_fix() -> None:
    error = errors.DataError("a column is missing", expected="'y'", got="'x'", where="t.csv", fix="say label=")
    assert str(error) == (
        "a column is missing\n  expected: 'y'\n  got:      'x'\n  where:    t.csv\n  fix:      say label="
    )


def test_messages_leave_out_what_is_not_said() -> None:
    assert str(errors.PathError("no such path")) == "no such path"
    assert str(errors.PathError(got=0)) == "got:      0"


@pytest.mark.parametrize("error", CLASSES)
def test_every_error_is_caught_by_the_base_class_and_by_a_builtin(error: type[Exception]) -> None:
    assert issubclass(error, errors.GatedAdaptersError)
    assert error is errors.GatedAdaptersError or issubclass(error, ValueError | RuntimeError | OSError)


@pytest.mark.parametrize("error", CLASSES)
def test_errors_cross_processes_whole(error: type[errors.GatedAdaptersError]) -> None:
    copy = pickle.loads(pickle.dumps(error("no", expected=1, got=2)))
    assert type(copy) is error
    assert str(copy) == str(error("no", expected=1, got=2))


def test_every_error_names_a_place_and_a_remedy() -> None:
    incomplete = []
    for path in sorted(Path(errors.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)) or path.parent.name == "testing":
                continue
            given = {keyword.arg for keyword in node.keywords}
            if node.func.id in errors.__all__ and None not in given and not {"where", "fix"} <= given:
                incomplete.append(f"{path.name}, line {node.lineno}")
    assert not incomplete
