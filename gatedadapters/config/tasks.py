"""A task as data: what it is learned from, and how it is read. Every command reads this one specification."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gatedadapters.config.base import Config, Count
from gatedadapters.config.rows import Rows

Kind = Literal["classification", "text", "chat", "choice"]
Source = Annotated[
    str | Rows, BeforeValidator(lambda value: Rows.of(str(value) if isinstance(value, FilePath) else value))
]

_COLUMNS: dict[Kind, frozenset[str]] = {  # what each kind reads beside `text`
    "classification": frozenset({"pair", "label"}),
    "text": frozenset({"answer"}),
    "chat": frozenset({"answer", "messages", "packing"}),
    "choice": frozenset({"pair", "label", "choices"}),
}
_PARTS = ("train", "validation", "test")


class TaskConfig(Config):
    """One task: files of the user's, records given in Python, or a bundled task.

    The kind says what an example is, and what is learned of it:

    - `classification`: a text (and a second one) with a label. A head of its own names the class.
    - `text`: running text, of which every token is learned, or a text with an `answer`, of which the answer alone is.
    - `chat`: a conversation, written out by the template of the tokenizer. The assistant's turns are learned.
    - `choice`: a question, its choices and the right one, which is learned. Without a column of choices, the labels of
      the table are the choices.

    The last three are for causal language models, whose output head they share.

    Attributes:
        name: name of the task in results. Default: the stem of the training file, or the bundled name.
        kind: see above. Default: `text` for a .txt file or where there is an answer column, `chat` where `messages` is
            given, `choice` where `choices` is; what a bundled task is; otherwise `classification`.
        train: training examples: CSV, TSV, JSON lines or parquet; for running text also .txt, in which empty lines
            separate paragraphs. In Python also a `datasets.Dataset` or a list of records.
        validation: validation examples. Default: they are split off the training examples.
        test: test examples. Default: they are split off the training examples, unless `validation` is given, which
            then stands in.
        bundled: name of a task that a data package carries, in place of files.
        text: column of the text, or of the question.
        pair: column of a second text; of a choice, the passage that the question is about.
        label: column of the label; of a choice, the text of the right one or its position from 0.
        answer: column of the answer.
        messages: column of the conversation, a list of records with `role` and `content`.
        choices: column of the choices, a list of texts.
        packing: whether several conversations share a row of the batch, which saves padding. None sees another.
        measures: what is reported of held-out examples beside the loss and the accuracy: `exact_match`, or a name that
            `gatedadapters.data.register_measure` knows.
        held_out: share of the training examples that is split off, where there is no file for it.
        max_train: the most training examples to use; more are sampled by seed, stratified by label.
        max_test: the same for test examples.
    """

    added: ClassVar = ("kind", "answer", "messages", "choices", "packing", "measures", "held_out")

    name: str | None = None
    kind: Kind | None = None
    train: Source | None = None
    validation: Source | None = None
    test: Source | None = None
    bundled: str | None = None
    text: str = "text"
    pair: str | None = None
    label: str = "label"
    answer: str | None = None
    messages: str = "messages"
    choices: str | None = None
    packing: bool = False
    measures: tuple[str, ...] = ()
    held_out: float = Field(0.2, gt=0, lt=1)
    max_train: Count | None = None
    max_test: Count | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_old_names(cls, data: Any) -> Any:
        """Corpora of version 0.1 say `file` and `max_texts`, and are text without saying so."""
        if not isinstance(data, Mapping):
            return data
        given = dict(data)
        if "messages" in given:  # said once and for all: the field may be left out of a copy where it is the default
            given.setdefault("kind", "chat")
        if not {"file", "max_texts"} & given.keys():
            return given
        said = ", ".join(name for name in ("file", "max_texts") if name in given)
        if (file := given.pop("file", None)) is not None:
            if given.setdefault("train", file) != file:
                raise ValueError("file is the old name of train: drop file")
            given.setdefault("kind", "text")
        if (count := given.pop("max_texts", None)) is not None:
            share = given.get("held_out", 0.2)
            if not isinstance(count, int) or not isinstance(share, int | float) or not 0 < share < 1:
                raise ValueError("max_texts is a whole number, and held_out lies between 0 and 1")
            held_out = max(1, round(share * count))
            given |= {"max_train": max(1, count - held_out), "max_test": held_out}
        instead = "write train: and kind: text for file, max_train and max_test for max_texts"
        # A FutureWarning, because Python hides a DeprecationWarning from users of the command.
        warnings.warn(f"TaskConfig: {said} will not be read any more; {instead}", FutureWarning, stacklevel=2)
        return given

    @model_validator(mode="after")
    def _one_source(self) -> TaskConfig:
        if (self.train is None) == (self.bundled is None):
            raise ValueError("give either train (a file) or bundled (the name of a bundled task)")
        if self.bundled is not None and (unread := self.changed_fields(self._of_files())):
            raise ValueError(f"a bundled task has splits and columns of its own: leave {', '.join(unread)} out")
        if isinstance(self.train, Rows) and self.name is None:
            raise ValueError("records that are given in Python have no file to name the task after: give a name")
        kind = self.stated_kind
        if kind is not None and (unread := self.changed_fields(self._unread(kind))):
            raise ValueError(
                f"kind: {kind} does not read everything given here: leave {', '.join(unread)} out, or give another kind"
            )
        if self.answer is not None and self.changed_fields({"messages"}):
            raise ValueError("give either messages (conversations), or text and answer (one question and its answer)")
        if self._is_txt and kind not in ("text", None):
            raise ValueError(f"a .txt file is running text: kind: {kind} needs a table")
        return self

    @property
    def stated_kind(self) -> Kind | None:
        """The kind, as far as the configuration says it; None for a bundled task that names none."""
        if self.kind is not None or self.bundled is not None:
            return self.kind
        if self.choices is not None:
            return "choice"
        return "text" if self.answer is not None or self._is_txt else "classification"

    @property
    def _is_txt(self) -> bool:
        return isinstance(self.train, str) and FilePath(self.train).suffix.lower() == ".txt"

    @staticmethod
    def _of_files() -> set[str]:
        return {"validation", "test", "text", "held_out", *_every_column()}

    def _unread(self, kind: Kind) -> set[str]:
        unread = set(_every_column() - _COLUMNS[kind])
        if self._is_txt:
            unread |= {"text", "answer"}
        if kind == "chat" and self.answer is None:
            unread |= {"text"}
        if kind == "classification":
            unread |= {"measures"}
        return unread

    @property
    def title(self) -> str:
        """The name of the task in results: `name`, or its default."""
        return self.name or self.bundled or FilePath(str(self.train)).stem

    def from_folder(self, folder: FilePath) -> Self:
        """A copy in which relative paths of files are resolved against `folder`."""
        files = {part: given for part in _PARTS if isinstance(given := getattr(self, part), str)}
        return self.model_copy(update={part: str(folder / file) for part, file in files.items()})


def _every_column() -> frozenset[str]:
    return frozenset().union(*_COLUMNS.values())


def distinct_titles(tasks: Sequence[TaskConfig]) -> None:
    """Check that no two tasks have one name.

    Raises:
        ValueError: two have.
    """
    titles = [task.title for task in tasks]
    if len(set(titles)) != len(titles):
        raise ValueError(f"tasks need distinct names, got {', '.join(titles)}")
