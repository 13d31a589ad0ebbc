"""Labelled tables of the user's: CSV, TSV, JSON lines and parquet.

To read another format, write a function that takes a path and returns a `_Table`, and enter its suffix in `_READERS`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gatedadapters.config.rows import Rows
from gatedadapters.data.tasks import Examples, Row, TextTask, distinct, split_rows, stratified_sample
from gatedadapters.errors import DataError
from gatedadapters.safe_files import file_errors
from gatedadapters.untrusted import check_json_depth

_Table = list[tuple[str, dict[str, Any]]]  # of each record: its file and line, and its cells by column


class _Labelled(NamedTuple):
    """One validated record. `where` is its file and line, for errors."""

    where: str
    text: str
    pair: str | None
    label: str


def read_task(
    train: str | Path | Rows,
    validation: str | Path | Rows | None = None,
    test: str | Path | Rows | None = None,
    *,
    text: str = "text",
    pair: str | None = None,
    label: str = "label",
    name: str | None = None,
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1),
    max_examples: int | None = None,
    seed: int = 0,
) -> TextTask:
    """Read one labelled table, or a table for each split, as a task.

    The suffix of a file, in small or capital letters, tells its format: `.csv`, `.tsv` (in which quotes are text),
    `.jsonl` or `.parquet`. A split with a table of its own is that table. Without a validation table, validation
    examples are split off the training table; if there is no test table either, so are test examples. Splitting is
    stratified and depends on the seed alone. Before it, a repeated text is reduced to one, and a text with two labels
    is dropped.

    Args:
        train: the training table, or the only one. In place of a file, `Rows` hold records that are given in Python.
        validation: the validation table.
        test: the test table.
        text: column of the text.
        pair: column of a second text, for tasks over two texts.
        label: column of the label: text, whole numbers or booleans. Classes are sorted, numbers by value.
        name: name of the task. Default: the stem of the training table.
        fractions: shares of train, validation and test when the training table is split.
        max_examples: the most examples to keep of each table; more are sampled, stratified.
        seed: seed of the splits and samples.

    Raises:
        DataError: a file is missing, empty, malformed or of another format; a column is missing; a cell is not text;
            there is only one class; a label occurs that the training table lacks; or a table is too small to split.
    """
    if min(fractions) < 0 or fractions[0] == 0 or abs(sum(fractions) - 1) > 1e-6:
        expected = "three shares (train, validation, test) that sum to 1"
        raise DataError(
            "the table cannot be split",
            expected=expected,
            got=fractions,
            where="fractions",
            fix="give three such shares",
        )
    columns = (text, pair, label)
    records = _labelled(train, *columns)
    classes = sorted({record.label for record in records}, key=numbers_by_value)
    if len(classes) < 2:
        got = f"only {classes[0]!r}"
        raise DataError(
            "nothing to tell apart",
            expected="two classes or more",
            got=got,
            where=train,
            fix="add examples of another class, or name another column with label=",
        )

    def rows_of(table: str | Path | Rows) -> list[Row]:
        return _head(_indexed(_labelled(table, *columns), classes, train), max_examples, seed)

    trained = _head(_indexed(records, classes, train), max_examples, seed)
    validated = None if validation is None else rows_of(validation)
    tested = None if test is None else rows_of(test)
    if validated is None:
        pool = distinct(trained)
        shares = (fractions[1], fractions[2] if tested is None else 0.0)
        n_validation, n_test = (max(round(share * len(pool)), 1) if share else 0 for share in shares)
        if n_validation + n_test >= len(pool):
            expected = f"more than {n_validation + n_test} distinct examples"
            raise DataError(
                "the table is too small to split",
                expected=expected,
                got=len(pool),
                where=train,
                fix="add examples, or give tables for validation and test",
            )
        trained, validated, drawn = split_rows(pool, train=None, validation=n_validation, test=n_test, seed=seed)
        tested = drawn if n_test else tested
    return TextTask(
        name or Path(str(train)).stem,
        Examples.from_rows(trained),
        Examples.from_rows(validated),
        None if tested is None else Examples.from_rows(tested),
        tuple(classes),
    )


def read_table(source: str | Path | Rows, columns: dict[str, str | None]) -> list[tuple[str, dict[str, object]]]:
    """The records of a table: of each its file and line, and its cells by column.

    Args:
        source: CSV, TSV, JSON lines or parquet; or records that are given in Python.
        columns: the columns that must be there, by the option that names them; None asks for no column.

    Raises:
        DataError: the file is missing, empty, malformed or of another format, or a column is missing.
    """
    table = _read_rows(source) if isinstance(source, Rows) else _read_file(Path(source))
    if not table:
        where = "the records given in Python" if isinstance(source, Rows) else source
        fix = "give data with examples in it"
        raise DataError("the table is empty", expected="examples", got="no records", where=where, fix=fix)
    for where, cells in table:
        for option, column in columns.items():
            if column is not None and column not in cells:
                raise DataError(
                    "a column is missing",
                    expected=repr(column),
                    got=", ".join(map(repr, cells)),
                    where=where,
                    fix=f"say which column it is with {option}=",
                )
    return table


def _read_rows(rows: Rows) -> _Table:
    table: _Table = []
    for number, record in enumerate(rows):
        where = f"record {number} of the data given in Python"
        if not isinstance(record, Mapping):
            raise DataError(
                "malformed record",
                expected="a mapping of columns to values",
                got=type(record).__name__,
                where=where,
                fix="give every record as a mapping",
            )
        table.append((where, dict(record)))
    return table


def _read_file(path: Path) -> _Table:
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        expected = ", ".join(_READERS)
        raise DataError(
            "unknown table format",
            expected=expected,
            got=path.suffix or "no suffix",
            where=path,
            fix="save the table in one of these formats, with its suffix",
        )
    if not path.is_file():
        raise DataError(
            "no such table",
            expected="a file",
            got="nothing there",
            where=path,
            fix="check the path; relative paths count from the configuration's folder",
        )
    try:
        with file_errors("read the table", path):
            return _READERS[suffix](path)
    except UnicodeDecodeError as error:
        fix = "save it as UTF-8"
        raise DataError("the table is not text", expected="UTF-8", got=error, where=path, fix=fix) from error


def _labelled(source: str | Path | Rows, text: str, pair: str | None, label: str) -> list[_Labelled]:
    """The validated records of one table."""
    table = read_table(source, {"text": text, "pair": pair, "label": label})
    return [
        _Labelled(
            where,
            cell_text(cells[text], f"{where}, column {text!r}"),
            None if pair is None else cell_text(cells[pair], f"{where}, column {pair!r}"),
            cell_label(cells[label], f"{where}, column {label!r}"),
        )
        for where, cells in table
    ]


def cell_text(cell: object, where: str) -> str:
    """The text of a cell.

    Raises:
        DataError: the cell, which lies at `where`, holds no text.
    """
    if not isinstance(cell, str) or not cell.strip():
        raise DataError(
            "a cell is not text",
            expected="some text",
            got=repr(cell),
            where=where,
            fix="fill the cell or drop its record; another column is named with text=",
        )
    return cell


def cell_label(cell: object, where: str) -> str:
    """The label in a cell, as text.

    Raises:
        DataError: the cell, which lies at `where`, holds no text, whole number or boolean.
    """
    if isinstance(cell, bool):
        return str(cell).lower()
    if isinstance(cell, int):
        return str(cell)
    if isinstance(cell, str) and cell.strip():
        return cell.strip()
    expected = "text, a whole number or a boolean"
    raise DataError(
        "a cell is not a label",
        expected=expected,
        got=repr(cell),
        where=where,
        fix="correct the cell, or name another column with label=",
    )


def numbers_by_value(label: str) -> tuple[int, str]:
    """A key that sorts labels: whole numbers by their value, then other labels as text."""
    return (int(label), "") if label.removeprefix("-").isdecimal() else (0, label)


def _indexed(records: Sequence[_Labelled], classes: Sequence[str], train: str | Path | Rows) -> list[Row]:
    index = {label: position for position, label in enumerate(classes)}
    for record in records:
        if record.label not in index:
            raise DataError(
                "a label does not occur in the training table",
                expected=", ".join(classes),
                got=repr(record.label),
                where=record.where,
                fix=f"add examples of it to {train}, or drop it",
            )
    return [Row(record.text, record.pair, index[record.label]) for record in records]


def _head(rows: list[Row], count: int | None, seed: int) -> list[Row]:
    """A stratified sample of `count` rows; all rows, in their order, if there are no more."""
    return [rows[index] for index in stratified_sample([row.label for row in rows], count, seed)]


def _read_delimited(path: Path, delimiter: str, quoting: Literal[0, 3], fix: str | None = None) -> _Table:
    with path.open(encoding="utf-8-sig", newline="") as lines, _long_cells():
        reader = csv.reader(lines, delimiter=delimiter, strict=True, quoting=quoting)
        try:
            header = next(reader, [])
            table: _Table = []
            for cells in reader:
                where = f"{path}, line {reader.line_num}"
                if cells and len(cells) != len(header):
                    got = f"{len(cells)} cells"
                    expected = f"{len(header)} cells"
                    raise DataError("malformed line", expected=expected, got=got, where=where, fix=fix)
                if cells:
                    table.append((where, dict(zip(header, cells, strict=True))))
        except csv.Error as error:
            raise DataError(
                "malformed line", got=error, where=f"{path}, line {reader.line_num}", fix="correct the line"
            ) from error
    return table


@contextmanager
def _long_cells() -> Iterator[None]:
    """A context in which the csv module reads cells of any length.

    Its default limit, which holds for the whole process, is 131,072 characters. A book in a cell is longer.
    """
    before = csv.field_size_limit(2**31 - 1)  # the largest C long of every platform
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_csv(path: Path) -> _Table:
    return _read_delimited(path, ",", csv.QUOTE_MINIMAL)


def _read_tsv(path: Path) -> _Table:
    # If quotes meant something, a stray one would join all records up to the next quote.
    fix = "quotes mean nothing in a .tsv: save cells that hold tabs or line breaks as .csv"
    return _read_delimited(path, "\t", csv.QUOTE_NONE, fix)


def _read_jsonl(path: Path) -> _Table:
    table: _Table = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                check_json_depth(line)
                record = json.loads(line)
            except ValueError as error:
                raise DataError(
                    "malformed line", expected="a JSON object", got=error, where=where, fix="correct the line"
                ) from error
            if not isinstance(record, dict):
                got = type(record).__name__
                raise DataError(
                    "malformed line", expected="a JSON object", got=got, where=where, fix="correct the line"
                )
            table.append((where, record))
    return table


def _read_parquet(path: Path) -> _Table:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        fix = "pip install 'gatedadapters[data]'"
        raise DataError("parquet needs pyarrow", expected="pyarrow", where=path, fix=fix) from error
    try:
        records = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(
            "malformed table", expected="a parquet file", got=error, where=path, fix="save the table again"
        ) from error
    return [(f"{path}, row {number}", record) for number, record in enumerate(records, start=1)]


_READERS: dict[str, Callable[[Path], _Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
