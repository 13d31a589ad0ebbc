from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from gatedadapters.data import read_task
from gatedadapters.errors import DataError

RECORDS = [
    {"text": f'review {index}, "fine"\nsecond line', "label": "good" if index % 3 else "bad"} for index in range(30)
]
SHORT: list[dict[str, object]] = [{"text": f"text {i}", "label": ("no", "yes")[i % 2]} for i in range(20)]


def write(path: Path, records: list[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        cells = [list(records[0])] + [[str(cell) for cell in record.values()] for record in records]
        if path.suffix == ".csv":
            cells = [['"' + cell.replace('"', '""') + '"' for cell in line] for line in cells]
        path.write_text("\n".join(("," if path.suffix == ".csv" else "\t").join(line) for line in cells) + "\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_task(tmp_path: Path, suffix: str) -> None:
    records = RECORDS if suffix != ".tsv" else [{**r, "text": str(r["text"]).replace("\n", " ")} for r in RECORDS]
    task = read_task(write(tmp_path / f"reviews{suffix}", records))
    assert task.name == "reviews"
    assert task.classes == ("bad", "good")
    assert task.test is not None
    assert [len(task.train), len(task.validation), len(task.test)] == [24, 3, 3]
    texts = [*task.train.texts, *task.validation.texts, *task.test.texts]
    assert sorted(texts) == sorted(str(record["text"]) for record in records)
    labels = dict(zip(task.train.texts, task.train.labels, strict=True))
    assert all(
        task.classes[labels[str(record["text"])]] == record["label"] for record in records if record["text"] in labels
    )


def test_the_split_is_deterministic_by_seed_and_stratified(tmp_path: Path) -> None:
    path = write(tmp_path / "reviews.csv", RECORDS)
    assert read_task(path, seed=4) == read_task(path, seed=4)
    assert read_task(path, seed=4) != read_task(path, seed=5)
    assert sorted(read_task(path).validation.labels) == [0, 1, 1]


def test_given_splits_are_taken_as_they_are(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", RECORDS[:20])
    held_out = write(tmp_path / "held-out.csv", RECORDS[18:])
    task = read_task(train, validation=held_out)
    assert len(task.train) == 20
    assert task.validation.texts == [record["text"] for record in RECORDS[18:]]
    assert task.test is None
    task = read_task(train, test=held_out)
    assert task.test is not None
    assert [len(task.train), len(task.validation), len(task.test)] == [18, 2, 12]


def test_pairs_and_named_columns_are_read(tmp_path: Path) -> None:
    records = [{"q": f"question {index}", "p": f"passage {index}", "y": index % 2 == 0} for index in range(10)]
    task = read_task(write(tmp_path / "t.jsonl", records), text="q", pair="p", label="y", name="yes-no")
    assert task.name == "yes-no"
    assert task.classes == ("false", "true")
    assert task.train.pairs is not None
    assert [text[-1] for text in task.train.texts] == [pair[-1] for pair in task.train.pairs]


def test_whole_number_labels_are_ordered_by_value(tmp_path: Path) -> None:
    records = [{"text": f"text {index}", "label": str(index % 12)} for index in range(48)]
    assert read_task(write(tmp_path / "t.csv", records)).classes == tuple(str(label) for label in range(12))


def test_labels_that_only_look_like_numbers_are_text(tmp_path: Path) -> None:
    records = [{"text": f"text {index}", "label": ("--1", "-", "-2", "3")[index % 4]} for index in range(48)]
    assert read_task(write(tmp_path / "t.csv", records)).classes == ("-2", "-", "--1", "3")


def test_quotes_in_tab_separated_tables_are_text(tmp_path: Path) -> None:
    lines = ['"To be\tyes', "plain\tno", 'or not"\tyes', '"quoted"\tno', 'say "so"\tyes', "other\tno"]
    (tmp_path / "t.tsv").write_text("\n".join(["text\tlabel", *lines]))
    task = read_task(tmp_path / "t.tsv", tmp_path / "t.tsv", tmp_path / "t.tsv")
    assert task.train.texts == [line.partition("\t")[0] for line in lines]
    assert task.train.labels == [1, 0] * 3


def test_cells_may_be_as_long_as_a_book_and_the_csv_module_is_left_as_it_was(tmp_path: Path) -> None:
    book = "word " * 40_000
    before = csv.field_size_limit()
    for suffix in (".csv", ".tsv"):
        task = read_task(write(tmp_path / f"t{suffix}", [{"text": book, "label": "long"}, *SHORT]))
        assert book in [*task.train.texts, *task.validation.texts, *(task.test.texts if task.test else [])]
        assert csv.field_size_limit() == before


def test_suffixes_may_be_written_in_capitals(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", SHORT)
    task = read_task(path.rename(tmp_path / "REVIEWS.CSV"))
    assert (task.name, task.classes) == ("REVIEWS", ("no", "yes"))


def test_a_table_can_be_cut(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "t.csv", RECORDS), max_examples=20, fractions=(0.5, 0.5, 0))
    assert [len(task.train), len(task.validation), task.test] == [10, 10, None]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.csv", "", ["the table is empty", "t.csv"]),
        ("t.csv", "text,label\n", ["the table is empty", "t.csv"]),
        ("t.csv", "text,y\na,1\n", ["'label'", "'text', 'y'", "say which column it is with label="]),
        ("t.csv", "text,label\na,1\nb\n", ["malformed line", "2 cells", "1 cells", "line 3"]),
        ("t.csv", 'text,label\n"a,1\n', ["malformed line", "line 2"]),
        ("t.tsv", 'text\tlabel\n"a\tb"\t1\n', ["2 cells", "3 cells", "line 2", "as .csv"]),
        ("t.csv", "text,label\na,1\n  ,0\n", ["not text", "'  '", "line 3, column 'text'"]),
        ("t.csv", "text,label\na,1\nb,\n", ["not a label", "line 3, column 'label'"]),
        ("t.csv", "text,label\na,1\nb,1\n", ["two classes or more", "only '1'"]),
        ("t.csv", "text,label\na,1\nb,0\n", ["too small to split", "more than 2", "2"]),
        (
            "t.jsonl",
            '{"text": "a", "label": 1}\n\n{"text": \n',
            ["malformed line", "a JSON object", "line 3"],
        ),
        ("t.jsonl", '["a", 1]\n', ["malformed line", "list", "line 1"]),
        ("t.jsonl", '{"text": 5, "label": 1}\n', ["not text", "5", "line 1, column 'text'"]),
        ("t.jsonl", '{"text": "a", "label": 0.5}\n', ["a whole number or a boolean", "0.5"]),
        ("t.jsonl", '{"text": "a", "label": 1}\n{"label": 1}\n', ["a column is missing", "'text'", "line 2"]),
        ("t.parquet", "no parquet", ["malformed table", "t.parquet"]),
        ("t.xlsx", "x", ["unknown table format", ".csv, .tsv, .jsonl, .parquet", ".xlsx"]),
    ],
)
def test_bad_tables_are_refused_with_the_place_and_the_remedy(
    tmp_path: Path, name: str, content: str, says: list[str]
) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as caught:
        read_task(tmp_path / name)
    for part in says:
        assert part in str(caught.value)


def test_other_encodings_and_absent_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    with pytest.raises(DataError, match="save it as UTF-8"):
        read_task(tmp_path / "t.csv")
    with pytest.raises(DataError, match=r"no such table[\s\S]*nowhere.csv"):
        read_task(tmp_path / "nowhere.csv")


def test_labels_unknown_to_the_training_table_are_named(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", RECORDS)
    other = write(tmp_path / "test.csv", [{"text": "a", "label": "mediocre"}])
    with pytest.raises(DataError, match=r"bad, good[\s\S]*'mediocre'[\s\S]*test.csv, line 2"):
        read_task(train, test=other)


def test_fractions_that_do_not_sum_to_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="sum to 1"):
        read_task(write(tmp_path / "t.csv", RECORDS), fractions=(0.8, 0.1, 0.2))
