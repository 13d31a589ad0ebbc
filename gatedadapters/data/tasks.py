"""Labelled tasks as plain data: what readers return, and what data sets are built from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from gatedadapters.errors import DataError

SPLITS = ("train", "validation", "test")


class Row(NamedTuple):
    """One labelled example before it is assigned to a split."""

    text: str
    pair: str | None
    label: int


@dataclass(frozen=True)
class Examples:
    """The examples of one split.

    Attributes:
        texts: one text per example.
        labels: one index per example, into the task's `classes`.
        pairs: a second text per example (a passage, a hypothesis); None in tasks over one text.
    """

    texts: list[str]
    labels: list[int]
    pairs: list[str] | None = None

    def __post_init__(self) -> None:
        lengths = {len(self.texts), len(self.labels), len(self.texts if self.pairs is None else self.pairs)}
        if len(lengths) > 1:
            pairs = "none" if self.pairs is None else len(self.pairs)
            raise DataError(
                "a split's columns differ in length",
                expected="as many labels (and pairs) as texts",
                got=f"{len(self.texts)} texts, {len(self.labels)} labels, {pairs} pairs",
                where="Examples",
                fix="give a label, and a pair or none, for each text",
            )

    def __len__(self) -> int:
        return len(self.texts)

    def sample(self, count: int | None, seed: int) -> Examples:
        """A stratified sample of `count` examples; all examples, in their order, if there are no more."""
        chosen = stratified_sample(self.labels, count, seed)
        pairs = None if self.pairs is None else [self.pairs[i] for i in chosen]
        return Examples([self.texts[i] for i in chosen], [self.labels[i] for i in chosen], pairs)

    @staticmethod
    def from_rows(rows: Iterable[Row]) -> Examples:
        """The columns of rows, of which either all have a second text or none has."""
        rows = list(rows)
        pairs = [row.pair for row in rows if row.pair is not None]
        return Examples([row.text for row in rows], [row.label for row in rows], pairs or None)


@dataclass(frozen=True)
class TextTask:
    """A labelled text-classification task, in splits.

    Attributes:
        name: name of the task in tables and logs.
        train: examples to train on.
        validation: examples to base decisions on.
        test: examples to report results on; None if the user gave none.
        classes: names of the classes; labels are indices into it.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples | None
    classes: tuple[str, ...]

    @property
    def n_classes(self) -> int:
        """Number of classes, which is the number of outputs of a head for this task."""
        return len(self.classes)

    def split(self, name: str) -> Examples:
        """The examples of one split.

        Raises:
            DataError: there is no such split, or the task has no test split.
        """
        _check_split(name, self.name)
        examples = {"train": self.train, "validation": self.validation, "test": self.test}[name]
        if examples is None:
            fix = "read it with a test file or a test fraction"
            raise DataError("the task has no test split", where=self.name, fix=fix)
        return examples


class Passage(NamedTuple):
    """A text of which every token is learned, or a question (`text`) of which the answer alone is learned."""

    text: str
    answer: str | None = None


class Message(NamedTuple):
    """One turn of a conversation. `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


class Conversation(NamedTuple):
    """Messages: one of the system at most, then the user's and the assistant's by turns; the assistant's come last."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class ChoiceExample:
    """One multiple-choice question. `answer` is an index into `choices`; `passage` may be empty."""

    question: str
    choices: tuple[str, ...]
    answer: int
    passage: str = ""


LanguageExample = Passage | Conversation | ChoiceExample
Example = TypeVar("Example", Passage, Conversation, ChoiceExample)


@dataclass(frozen=True)
class LanguageTask(Generic[Example]):
    """A task of a causal language model, in splits.

    Attributes:
        name: name of the task in tables and logs.
        train: examples to train on.
        validation: examples to base decisions on.
        test: examples to report results on.
    """

    name: str
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def split(self, name: str) -> tuple[Example, ...]:
        """The examples of one split.

        Raises:
            DataError: there is no such split.
        """
        _check_split(name, self.name)
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


class PassageTask(LanguageTask[Passage]):
    """Running text, or texts with answers."""


@dataclass(frozen=True)
class ChatTask(LanguageTask[Conversation]):
    """Conversations.

    Attributes:
        packing: whether several conversations share a row of a training batch.
    """

    packing: bool = False


class ChoiceTask(LanguageTask[ChoiceExample]):
    """Multiple-choice questions, which may differ in their number of choices."""


AnyTask = TextTask | LanguageTask[Any]
"""A task of any kind."""


def text_key(*texts: str | None) -> str:
    """A key that is equal for examples of the same words, whatever their case and spacing."""
    return "\0".join(" ".join((text or "").casefold().split()) for text in texts)


def distinct(rows: Iterable[Row]) -> list[Row]:
    """The rows without repeats, and without the texts that occur under two labels."""
    first: dict[str, Row] = {}
    contradictory: set[str] = set()
    for row in rows:
        key = text_key(row.text, row.pair)
        if row.label != first.setdefault(key, row).label:
            contradictory.add(key)
    return [row for key, row in first.items() if key not in contradictory]


def stratified_order(labels: Sequence[int], seed: int) -> list[int]:
    """A random order of `range(len(labels))` of which every part is stratified, wherever it is cut.

    Each class is shuffled and spread evenly over [0, 1); sorting by that position interleaves the classes. Every
    stretch of the order therefore has nearly the class shares of the whole.
    """
    generator = np.random.default_rng(seed)
    position = np.empty(len(labels))
    array = np.asarray(labels)
    for label in np.unique(array):
        members = generator.permutation(np.flatnonzero(array == label))
        position[members] = (np.arange(len(members)) + generator.random()) / len(members)
    return [int(index) for index in np.argsort(position, kind="stable")]


def stratified_sample(labels: Sequence[int], count: int | None, seed: int) -> list[int]:
    """The first `count` indices of a stratified order; all indices, in order, if there are no more."""
    if count is None or len(labels) <= count:
        return list(range(len(labels)))
    return stratified_order(labels, seed)[:count]


def split_sizes(available: int, train: int | None, validation: int, test: int) -> tuple[int, int, int]:
    """Sizes (train, validation, test) of the splits of `available` examples.

    `train=None` takes all that validation and test leave. If there are fewer examples than asked for, all sizes shrink
    in proportion.
    """
    if train is None:
        train = max(available - validation - test, 1)
    wanted = train + validation + test
    if wanted > available:
        validation, test = validation * available // wanted, test * available // wanted
        train = min(train, available - validation - test)
    return train, validation, test


def split_rows(
    rows: Sequence[Row], *, train: int | None, validation: int, test: int, seed: int
) -> tuple[list[Row], list[Row], list[Row]]:
    """Stratified disjoint splits (train, validation, test) of rows; see `split_sizes` for their sizes.

    The test rows are drawn first, so they do not depend on how many training rows are asked for.
    """
    train_size, validation_size, test_size = split_sizes(len(rows), train, validation, test)
    order = [rows[index] for index in stratified_order([row.label for row in rows], seed)]
    first, second = test_size, test_size + validation_size
    return order[second : second + train_size], order[first:second], order[:first]


def _check_split(name: str, task: str) -> None:
    if name not in SPLITS:
        raise DataError(
            "no such split", expected=" / ".join(SPLITS), got=repr(name), where=task, fix="choose one of these"
        )
