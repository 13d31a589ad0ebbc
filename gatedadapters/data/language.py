"""Text for language models: running text in blocks, or questions of which only the answers are learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from gatedadapters.data.files import cell_text, read_table
from gatedadapters.errors import DataError

IGNORED = -100


class Passage(NamedTuple):
    """A text, or a question (`text`) and its answer."""

    text: str
    answer: str | None = None


def read_passages(file: str | Path, *, text: str = "text", answer: str | None = None) -> list[Passage]:
    """The passages of a file, in its order.

    Args:
        file: a `.txt` file, whose paragraphs are separated by empty lines, or a table.
        text: column of the text, or of the question.
        answer: column of the answer; None reads texts alone.

    Raises:
        DataError: the file is missing, empty or malformed, or a column is missing.
    """
    path = Path(file)
    if path.suffix.lower() != ".txt":
        table = read_table(path, {"text": text, "answer": answer})
        return [
            Passage(
                cell_text(cells[text], f"{where}, column {text!r}"),
                None if answer is None else cell_text(cells[answer], f"{where}, column {answer!r}"),
            )
            for where, cells in table
        ]
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "the text cannot be read",
            expected="a UTF-8 file",
            got=error,
            where=path,
            fix="check the path, and save the text as UTF-8",
        ) from error
    found = [Passage(part.strip()) for part in content.split("\n\n") if part.strip()]
    if not found:
        raise DataError(
            "the text is empty",
            expected="paragraphs",
            got="nothing",
            where=path,
            fix="add text, with an empty line between two paragraphs",
        )
    return found


def sample_passages(passages: Sequence[Passage], count: int | None, *, seed: int) -> list[Passage]:
    """A random sample of `count` passages, in their order; all passages if there are no more, or if `count` is None."""
    if count is None or len(passages) <= count:
        return list(passages)
    order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(seed))
    return [passages[i] for i in sorted(order[:count].tolist())]


def split_passages(
    passages: Sequence[Passage], held_out: float, *, seed: int, where: object = None
) -> tuple[list[Passage], list[Passage]]:
    """Split passages at random. A repeated passage is kept once, so that no text lies on both sides.

    Args:
        passages: the passages to split.
        held_out: the share to hold out; at least one passage is held out and one is not.
        seed: seed of the draw.
        where: where the passages come from, for errors.

    Returns:
        The passages to learn from, and those that are held out.

    Raises:
        DataError: there are fewer than two distinct passages.
    """
    distinct = list(dict.fromkeys(passages))
    if len(distinct) < 2:
        raise DataError(
            "this is too little text to hold some out",
            expected="at least two different texts",
            got=len(distinct),
            where=where,
            fix="add texts; in a .txt file put an empty line between paragraphs",
        )
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(len(distinct) - 1, max(1, round(held_out * len(distinct))))
    return [distinct[i] for i in order[count:]], [distinct[i] for i in order[:count]]


class LanguageDataset(Dataset[dict[str, Any]]):
    """Items with `input_ids`, `attention_mask` and `labels`: lists of at most `max_length` ints.

    Passages without an answer are joined, with an end-of-text token between them, and cut into blocks of `max_length`
    tokens. A passage with an answer is an item of its own; its labels are -100 on the question, which the loss ignores.

    Args:
        passages: the texts, or questions and answers.
        tokenizer: the tokenizer of the model.
        max_length: tokens of a block, or after which a question is cut.

    Raises:
        DataError: no passage has a token to predict.
    """

    def __init__(self, passages: Sequence[Passage], tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> None:
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self._items: list[dict[str, list[int]]] = []
        stream: list[int] = []
        for passage in passages:
            ids = list(tokenizer(passage.text, add_special_tokens=False)["input_ids"])
            if passage.answer is None:
                stream += ids + end
                continue
            answer = list(tokenizer(f" {passage.answer.strip()}", add_special_tokens=False)["input_ids"]) + end
            answer = answer[: max_length - 1]
            ids = ids[-(max_length - len(answer)) :]  # a long question keeps its end, next to the answer
            self._add(ids + answer, [IGNORED] * len(ids) + answer)
        for start in range(0, len(stream), max_length):
            block = stream[start : start + max_length]
            if len(block) > 1:
                self._add(block, block)
        if not self._items:
            raise DataError(
                "there is nothing to predict",
                expected="a text of two tokens or more",
                got="none",
                where="LanguageDataset",
                fix="give longer texts",
            )

    def _add(self, ids: list[int], labels: list[int]) -> None:
        self._items.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._items[index])


class LanguageCollator:
    """Pads items of a `LanguageDataset` on the right, to the longest."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.fill = {"input_ids": int(pad or 0), "attention_mask": 0, "labels": IGNORED}

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Make one batch: LongTensors of shape (batch, length)."""
        length = max(len(feature["input_ids"]) for feature in features)
        return {
            key: torch.tensor([list(f[key]) + [fill] * (length - len(f[key])) for f in features])
            for key, fill in self.fill.items()
        }
