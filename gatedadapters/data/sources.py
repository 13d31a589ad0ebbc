"""From the specification of a task to the task: the one reader that every command uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gatedadapters.config.rows import Rows
from gatedadapters.config.tasks import Kind, TaskConfig
from gatedadapters.data.bundled import CHOICE_TASKS, CORPORA, load_choices, load_corpus
from gatedadapters.data.bundled import load_task as load_bundled
from gatedadapters.data.chat import checked, read_conversation
from gatedadapters.data.files import cell_label, cell_text, numbers_by_value, read_table, read_task
from gatedadapters.data.language import read_passages, sample_examples, split_examples
from gatedadapters.data.tasks import (
    AnyTask,
    ChatTask,
    ChoiceExample,
    ChoiceTask,
    Conversation,
    LanguageTask,
    Message,
    Passage,
    PassageTask,
    TextTask,
)
from gatedadapters.errors import ConfigError, DataError


def kind_of(task: TaskConfig) -> Kind:
    """The kind of a task: what its configuration says, or what a bundled task is.

    Raises:
        ConfigError: a bundled task is of another kind than the configuration says.
    """
    if task.bundled is None:
        kind = task.stated_kind
        assert kind is not None
        return kind
    found: Kind = "choice" if task.bundled in CHOICE_TASKS else "text" if task.bundled in CORPORA else "classification"
    if task.kind not in (None, found):
        raise ConfigError(
            "a bundled task is of another kind",
            expected=f"kind: {found}",
            got=f"kind: {task.kind}",
            where=f"task {task.title!r}, bundled: {task.bundled}",
            fix="leave kind out",
        )
    return found


def load_task(task: TaskConfig, seed: int = 0, *, decides: bool = True) -> AnyTask:
    """Read a task of any kind, split it, and cut it to the configured numbers of examples.

    Where there are validation examples and no test examples, the former stand in. Splits and samples depend on the seed
    alone.

    Args:
        task: the specification.
        seed: seed of splits and samples.
        decides: whether validation examples are needed, because something is decided by them. Otherwise texts,
            conversations and choices are split into training and test examples only.

    Returns:
        A `TextTask` for kind `classification`; a `PassageTask`, `ChatTask` or `ChoiceTask` for the others.

    Raises:
        ConfigError: a bundled task is of another kind than the configuration says.
        DataError: a file is missing, empty or malformed, a column is missing, an example is none of its kind, or a
            data package is not installed.
    """
    kind = kind_of(task)
    if kind == "classification":
        return _classification(task, seed)
    if task.bundled in CHOICE_TASKS:
        train, test = task.max_train or 1000, task.max_test or 200
        chosen = load_choices(task.bundled, train=train, validation=min(train, 500), test=test, seed=seed)
        return ChoiceTask(task.title, chosen.train, chosen.validation, chosen.test)
    parts = _splits(task, kind, seed, decides=decides)
    # Random samples and not the first examples, because files may be sorted.
    train_part, tested = (
        tuple(sample_examples(part, count, seed=seed))
        for part, count in ((parts[0], task.max_train), (parts[2], task.max_test))
    )
    options = {"packing": task.packing} if kind == "chat" else {}
    return _KINDS[kind](task.title, train_part, tuple(parts[1]), tested, **options)


def _classification(task: TaskConfig, seed: int) -> TextTask:
    if task.bundled is not None:
        train, test = task.max_train or 1500, task.max_test or 500
        loaded = load_bundled(task.bundled, train=train, validation=min(train, 500), test=test, seed=seed)
    else:
        assert task.train is not None
        loaded = read_task(
            *(task.train, task.validation, task.test),
            text=task.text,
            pair=task.pair,
            label=task.label,
            fractions=(1 - task.held_out, task.held_out / 2, task.held_out / 2),
            seed=seed,
        )
    held_out = loaded.validation if loaded.test is None else loaded.test
    cut = loaded.train.sample(task.max_train, seed), held_out.sample(task.max_test, seed)
    return TextTask(task.title, cut[0], loaded.validation, cut[1], loaded.classes)


_KINDS: dict[Kind, type[LanguageTask[Any]]] = {"text": PassageTask, "chat": ChatTask, "choice": ChoiceTask}


def _splits(task: TaskConfig, kind: Kind, seed: int, *, decides: bool) -> tuple[list[Any], list[Any], list[Any]]:
    """Training, validation and test examples. What is held out of the training examples is halved."""
    if task.bundled is not None:
        everything: list[Any] = [Passage(text) for text in load_corpus(task.bundled)]
        validation = tested = None
    else:
        assert task.train is not None
        classes = _classes(task) if kind == "choice" and task.choices is None else ()
        everything = _read(task.train, task, kind, classes)
        validation, tested = (
            None if source is None else _read(source, task, kind, classes) for source in (task.validation, task.test)
        )
    if validation is not None:
        return everything, validation, validation if tested is None else tested
    if tested is not None and not decides:
        return everything, tested, tested
    where = task.bundled or task.train
    learned, held_out = split_examples(everything, task.held_out, seed=seed, where=where)
    if tested is not None:
        return learned, held_out, tested
    half = (len(held_out) + 1) // 2 if decides else len(held_out)
    return learned, held_out[half:] or held_out, held_out[:half]  # a single example stands in for both


def _read(source: str | Rows, task: TaskConfig, kind: Kind, classes: tuple[str, ...]) -> list[Any]:
    if kind == "text":
        return read_passages(source, text=task.text, answer=task.answer)
    if kind == "choice":
        return _read_choices(source, task, classes)
    if task.answer is not None:
        return [_short_conversation(passage) for passage in read_passages(source, text=task.text, answer=task.answer)]
    return [
        read_conversation(_plain(cells[task.messages]), f"{where}, column {task.messages!r}")
        for where, cells in read_table(source, {"messages": task.messages})
    ]


def _short_conversation(passage: Passage) -> Conversation:
    assert passage.answer is not None
    return checked([Message("user", passage.text), Message("assistant", passage.answer)], "a question and its answer")


def _classes(task: TaskConfig) -> tuple[str, ...]:
    """The labels of a table, which are the choices of all its questions."""
    assert task.train is not None
    table = read_table(task.train, {"label": task.label})
    found = {cell_label(cells[task.label], f"{where}, column {task.label!r}") for where, cells in table}
    if len(found) < 2:
        raise DataError(
            "nothing to choose from",
            expected="two labels or more",
            got=f"only {found.pop()!r}",
            where=task.train,
            fix="name the column of the choices with choices=, or give examples of another label",
        )
    return tuple(sorted(found, key=numbers_by_value))


def _read_choices(source: str | Rows, task: TaskConfig, classes: tuple[str, ...]) -> list[ChoiceExample]:
    columns = {"text": task.text, "pair": task.pair, "label": task.label, "choices": task.choices}
    found = []
    for where, cells in read_table(source, columns):
        choices = classes or _choices(cells[str(task.choices)], f"{where}, column {task.choices!r}")
        label = cell_label(cells[task.label], f"{where}, column {task.label!r}")
        passage = "" if task.pair is None else cell_text(cells[task.pair], f"{where}, column {task.pair!r}")
        question = cell_text(cells[task.text], f"{where}, column {task.text!r}")
        found.append(ChoiceExample(question, choices, _position(label, choices, where, task.label), passage))
    return found


def _choices(cell: object, where: str) -> tuple[str, ...]:
    cell = _plain(cell)
    listed = isinstance(cell, Sequence) and not isinstance(cell, str)
    choices = [str(choice).strip() for choice in cell] if listed else []  # type: ignore[attr-defined]
    if len(choices) < 2 or len(set(choices)) < len(choices) or not all(choices):
        raise DataError(
            "a cell is no list of choices",
            expected="two different texts or more",
            got=f"{cell!r:.80}",
            where=where,
            fix='write it as JSON: ["the first", "the second"]',
        )
    return tuple(choices)


def _position(label: str, choices: tuple[str, ...], where: str, column: str) -> int:
    if label in choices:
        return choices.index(label)
    if label.isdecimal() and int(label) < len(choices):
        return int(label)
    raise DataError(
        "the right choice is not among the choices",
        expected=f"one of {', '.join(choices)}, or a position in 0..{len(choices) - 1}",
        got=label,
        where=f"{where}, column {column!r}",
        fix="correct the label",
    )


def _plain(cell: object) -> object:
    """A list: as it is, or out of the JSON text that stands for it in a table without lists, such as CSV."""
    if isinstance(cell, str):
        try:
            return json.loads(cell)
        except json.JSONDecodeError:
            return cell
    tolist = getattr(cell, "tolist", None)  # a NumPy array
    return tolist() if callable(tolist) else cell
