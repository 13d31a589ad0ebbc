"""One specification of a task: what each kind reads, from files and from records in Python, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from gatedadapters.config import TaskConfig
from gatedadapters.data import (
    ChatTask,
    ChoiceExample,
    ChoiceTask,
    Conversation,
    LanguageTask,
    Message,
    Passage,
    PassageTask,
    Rows,
    TextTask,
    kind_of,
    load_task,
)
from gatedadapters.errors import ConfigError, DataError

QUESTIONS = [{"q": f"where is {n}", "a": f"at {n % 3}"} for n in range(20)]
CHATS = [
    {"messages": [{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}]}
    for row in QUESTIONS
]
CHOICES = [{"text": row["q"], "options": ["at 0", "at 1", "at 2"], "label": row["a"]} for row in QUESTIONS]


def everything(task: LanguageTask[Any]) -> list[Any]:
    return [*task.train, *task.validation, *task.test]


def test_every_kind_reads_its_examples() -> None:
    cases: list[tuple[dict[str, Any], type, Any]] = [
        ({"train": [{"text": row["q"]} for row in QUESTIONS], "kind": "text"}, PassageTask, Passage("where is 0")),
        ({"train": QUESTIONS, "text": "q", "answer": "a"}, PassageTask, Passage("where is 0", "at 0")),
        (
            {"train": CHATS, "kind": "chat"},
            ChatTask,
            Conversation((Message("user", "where is 0"), Message("assistant", "at 0"))),
        ),
        (
            {"train": QUESTIONS, "kind": "chat", "text": "q", "answer": "a"},
            ChatTask,
            Conversation((Message("user", "where is 0"), Message("assistant", "at 0"))),
        ),
        (
            {"train": CHOICES, "choices": "options"},
            ChoiceTask,
            ChoiceExample("where is 0", ("at 0", "at 1", "at 2"), 0),
        ),
        (
            {"train": QUESTIONS, "kind": "choice", "text": "q", "label": "a"},
            ChoiceTask,
            ChoiceExample("where is 0", ("at 0", "at 1", "at 2"), 0),
        ),
    ]
    for data, kind, example in cases:
        task = load_task(TaskConfig(name="x", **data))
        assert isinstance(task, kind)
        assert isinstance(task, LanguageTask)
        assert example in everything(task), data
        assert (len(task.train), len(task.validation), len(task.test)) == (16, 2, 2)
    labelled = load_task(TaskConfig(name="x", train=QUESTIONS, text="q", label="a"))
    assert isinstance(labelled, TextTask)
    assert labelled.classes == ("at 0", "at 1", "at 2")


def test_a_kind_follows_from_what_is_given(tmp_path: Path) -> None:
    for data, kind in (
        ({"train": "a.csv"}, "classification"),
        ({"train": "a.TXT"}, "text"),
        ({"train": "a.csv", "answer": "b"}, "text"),
        ({"train": "a.jsonl", "messages": "messages"}, "chat"),
        ({"train": "a.jsonl", "choices": "c"}, "choice"),
        ({"bundled": "piqa"}, "choice"),
        ({"bundled": "xsum"}, "text"),
        ({"bundled": "tweets"}, "classification"),
    ):
        task = TaskConfig(**data)  # type: ignore[arg-type]
        assert kind_of(task) == kind
        assert kind_of(TaskConfig.parse(task.model_dump(exclude_defaults=True), where="a copy")) == kind
    with pytest.raises(ConfigError, match=r"(?s)another kind.*kind: choice.*leave kind out"):
        kind_of(TaskConfig(bundled="piqa", kind="chat"))


def test_files_of_all_formats_and_data_sets_give_the_same_examples(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    datasets = pytest.importorskip("datasets")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    parquet.write_table(pa.Table.from_pylist(CHATS), tmp_path / "a.parquet")
    (tmp_path / "a.tsv").write_text("\n".join(["messages", *(json.dumps(row["messages"]) for row in CHATS)]))
    sources: list[Any] = [*(str(tmp_path / f"a.{suffix}") for suffix in ("jsonl", "parquet", "tsv")), CHATS]
    sources.append(datasets.Dataset.from_list(CHATS))
    found = [load_task(TaskConfig(name="x", kind="chat", train=source)) for source in sources]
    assert all(task == found[0] for task in found)


def test_splits_do_not_overlap_depend_on_the_seed_and_take_the_files_that_are_given() -> None:
    def loaded(seed: int = 0, **more: Any) -> LanguageTask[Any]:
        task = load_task(TaskConfig(name="x", train=QUESTIONS, text="q", answer="a", **more), seed)
        assert isinstance(task, LanguageTask)
        return task

    task = loaded(held_out=0.4)
    assert (len(task.train), len(task.validation), len(task.test)) == (12, 4, 4)
    assert len(set(everything(task))) == 20
    assert loaded(held_out=0.4) == task != loaded(1, held_out=0.4)
    cut = loaded(max_train=5, max_test=1)
    assert (len(cut.train), len(cut.test)) == (5, 1)
    assert set(cut.train) < set(loaded().train)
    other = [{"q": "who is 3", "a": "me"}]
    assert loaded(test=other).test == (Passage("who is 3", "me"),)
    assert len(loaded(test=other).train) == 16
    stood_in = loaded(validation=other)
    assert stood_in.test == stood_in.validation == (Passage("who is 3", "me"),)
    assert len(stood_in.train) == 20
    undecided = load_task(TaskConfig(name="x", train=QUESTIONS, text="q", answer="a"), decides=False)
    assert (len(undecided.split("train")), len(undecided.split("test"))) == (16, 4)


def test_records_given_in_python_stay_those_records_through_copies_of_the_configuration() -> None:
    task = TaskConfig(name="x", train=QUESTIONS, text="q", answer="a")
    assert isinstance(task.train, Rows)
    written = task.model_dump(mode="json")
    assert written["train"] == str(task.train)
    assert TaskConfig.parse(written, where="test") == task == pickle.loads(pickle.dumps(task))
    assert hash(task) == hash(pickle.loads(pickle.dumps(task)))
    assert TaskConfig(name="x", train=QUESTIONS[1:], text="q", answer="a") != task
    with pytest.raises(ConfigError, match="give them there again"):
        TaskConfig(name="x", train="rows:0123456789abcdef")
    with pytest.raises(ConfigError, match="give a name"):
        TaskConfig(train=QUESTIONS)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"train": [], "kind": "text"}, "table is empty"),
        ({"train": "empty.txt"}, "text is empty"),
        ({"train": "empty.jsonl", "kind": "chat"}, "table is empty"),
        ({"train": "one.txt"}, "(?s)too little text.*one.txt.*empty line"),
        ({"train": "nowhere.jsonl", "kind": "chat"}, "no such table"),
        ({"train": "nowhere.txt"}, "cannot be read"),
        ({"train": [["no", "mapping"]], "kind": "text"}, "(?s)malformed record.*list"),
        ({"train": QUESTIONS, "kind": "chat"}, "(?s)column is missing.*'messages'.*messages="),
        ({"train": QUESTIONS, "text": "q", "answer": "b"}, "(?s)column is missing.*'b'.*answer="),
        ({"train": [{"text": "a", "label": "b"}] * 3, "kind": "choice"}, "(?s)nothing to choose from.*choices="),
        ({"train": [{**CHOICES[0], "options": ["at 0"]}], "choices": "options"}, "(?s)no list of choices.*JSON"),
        ({"train": [{**CHOICES[0], "options": "at 0"}], "choices": "options"}, "no list of choices"),
        ({"train": [{**CHOICES[0], "label": 3}], "choices": "options"}, r"(?s)not among the choices.*0\.\.2"),
        ({"train": QUESTIONS, "text": "q", "answer": "a", "test": "lines.txt"}, "(?s)no columns.*'a'"),
    ],
)
def test_data_that_cannot_be_read_are_refused(
    data: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (
        ("empty.txt", "\n\n"),
        ("empty.jsonl", "\n"),
        ("one.txt", "one\nline"),
        ("lines.txt", "a\n\nb"),
    ):
        Path(name).write_text(content)
    with pytest.raises(DataError, match=named):
        load_task(TaskConfig(name="x", **data))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"train": "a.csv", "kind": "chat", "label": "b"}, "leave label out"),
        ({"train": "a.csv", "kind": "chat", "text": "b"}, "leave text out"),
        ({"train": "a.csv", "kind": "text", "packing": True}, "leave packing out"),
        ({"bundled": "xsum", "packing": True}, "leave packing out"),
        ({"train": "a.csv", "measures": ["exact_match"]}, "leave measures out"),
        ({"train": "a.csv", "kind": "chat", "answer": "b", "messages": "m"}, "either messages .* or text and answer"),
        ({"train": "a.txt", "kind": "chat"}, "needs a table"),
        ({"train": "a.txt", "answer": "b"}, "leave answer out"),
        ({"train": "a.csv", "kind": "poem"}, "kind"),
        ({"train": 3}, "train"),
    ],
)
def test_fields_that_a_kind_does_not_read_are_refused(data: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){named}"):
        TaskConfig(**data)


def test_corpora_of_0_1_still_load_and_name_the_new_keys(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_text("\n\n".join(f"text {i}" for i in range(40)))
    with pytest.warns(FutureWarning, match="train: and kind: text for file"):
        old = TaskConfig.parse({"file": str(tmp_path / "old.txt"), "max_texts": 20}, where="test")
    task = load_task(old, decides=False)
    assert (len(task.split("train")), len(task.split("test"))) == (16, 4)
    with pytest.raises(ConfigError, match="drop file"):
        TaskConfig.parse({"file": "a.csv", "train": "b.csv"}, where="test")
    with pytest.warns(DeprecationWarning, match="TaskConfig"):
        from gatedadapters.config import CorpusConfig  # type: ignore[attr-defined]
    assert CorpusConfig is TaskConfig
    assert "measures" not in TaskConfig(train="a.csv").model_dump()  # studies and runs of 0.1 stay the same
