"""From examples of language tasks to tokens: running text in blocks, or answers of which alone the loss is taken."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from gatedadapters.config.deprecation import renamed
from gatedadapters.config.rows import Rows
from gatedadapters.data.chat import IGNORED, conversation_tokens
from gatedadapters.data.files import cell_text, read_table
from gatedadapters.data.tasks import ChoiceExample, Conversation, Example, LanguageExample, Passage
from gatedadapters.errors import DataError

Item = dict[str, Any]
"""One tokenised row: `input_ids`, `labels` (-100 where nothing is learned), and `attention_mask` or `position_ids`."""


def read_passages(file: str | Path | Rows, *, text: str = "text", answer: str | None = None) -> list[Passage]:
    """The passages of a file, in its order.

    Args:
        file: a `.txt` file, whose paragraphs are separated by empty lines, or a table.
        text: column of the text, or of the question.
        answer: column of the answer; None reads texts alone.

    Raises:
        DataError: the file is missing, empty or malformed, or a column is missing.
    """
    if isinstance(file, Rows) or Path(file).suffix.lower() != ".txt":
        return [
            Passage(
                cell_text(cells[text], f"{where}, column {text!r}"),
                None if answer is None else cell_text(cells[answer], f"{where}, column {answer!r}"),
            )
            for where, cells in read_table(file, {"text": text, "answer": answer})
        ]
    path = Path(file)
    if answer is not None:
        raise DataError(
            "a .txt file has no columns",
            expected=f"a table with the column {answer!r}",
            got="running text",
            where=path,
            fix="make it a table, or leave answer out",
        )
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


def sample_examples(examples: Sequence[Example], count: int | None, *, seed: int) -> list[Example]:
    """A random sample of `count` examples, in their order; all examples if there are no more, or if `count` is None."""
    if count is None or len(examples) <= count:
        return list(examples)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))
    return [examples[i] for i in sorted(order[:count].tolist())]


def split_examples(
    examples: Sequence[Example], held_out: float, *, seed: int, where: object = None
) -> tuple[list[Example], list[Example]]:
    """Split examples at random. A repeated example is kept once, so that none lies on both sides.

    Args:
        examples: the examples to split.
        held_out: the share to hold out; at least one example is held out and one is not.
        seed: seed of the draw.
        where: where the examples come from, for errors.

    Returns:
        The examples to learn from, and those that are held out.

    Raises:
        DataError: there are fewer than two distinct examples.
    """
    distinct = list(dict.fromkeys(examples))
    if len(distinct) < 2:
        raise DataError(
            "this is too little text to hold some out",
            expected="at least two different examples",
            got=len(distinct),
            where=where,
            fix="add examples; in a .txt file put an empty line between paragraphs",
        )
    order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(len(distinct) - 1, max(1, round(held_out * len(distinct))))
    return [distinct[i] for i in order[count:]], [distinct[i] for i in order[:count]]


def prompt(example: ChoiceExample) -> str:
    """A multiple-choice question as the text that a model continues."""
    return f"{example.passage}\nQuestion: {example.question}\nAnswer:".strip()


class LanguageDataset(Dataset[Item]):
    """Items with `input_ids`, `attention_mask` and `labels`: lists of at most `max_length` ints.

    Passages without an answer are joined, with an end-of-text token between them, and cut into blocks of `max_length`
    tokens. Every other example is an item of its own, whose labels are -100 on everything but the answer, which the
    loss ignores. The answer of a passage or of a multiple-choice question is kept before the question is. Of a
    conversation the first `max_length` tokens are kept; a warning counts the conversations that thereby lose every
    answer, which are left out.

    Args:
        examples: the examples.
        tokenizer: the tokenizer of the model.
        max_length: tokens of a block, or after which an example is cut.
        packing: put several conversations into one item of at most `max_length` tokens. Such items have
            `position_ids`, which begin at 0 with every conversation, in place of an attention mask.

    Raises:
        DataError: no example has a token to predict, the length limit cuts every answer off, or the tokenizer's chat
            template is missing or refuses a conversation.
    """

    def __init__(
        self,
        examples: Iterable[LanguageExample],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 128,
        *,
        packing: bool = False,
    ) -> None:
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self._items: list[Item] = []
        stream: list[int] = []
        cut, conversations = 0, 0
        for example in examples:
            if isinstance(example, Conversation):
                conversations += 1
                ids, labels = (part[:max_length] for part in conversation_tokens(example, tokenizer))
                if _predicts(labels):
                    self._add(ids, labels)
                else:
                    cut += 1
                continue
            if isinstance(example, ChoiceExample):
                example = Passage(prompt(example), example.choices[example.answer])
            ids = list(tokenizer(example.text, add_special_tokens=False)["input_ids"])
            if example.answer is None:
                stream += ids + end
                continue
            answer = list(tokenizer(f" {example.answer.strip()}", add_special_tokens=False)["input_ids"]) + end
            answer = answer[: max_length - 1]
            ids = ids[-(max_length - len(answer)) :]  # a long question keeps its end, next to the answer
            self._add(ids + answer, [IGNORED] * len(ids) + answer)
        for start in range(0, len(stream), max_length):
            block = stream[start : start + max_length]
            if len(block) > 1:
                self._add(block, block)
        if cut:
            _tell_cut(cut, conversations, max_length, nothing_left=not self._items)
        if not self._items:
            raise DataError(
                "there is nothing to predict",
                expected="a text of two tokens or more",
                got="none",
                where="LanguageDataset",
                fix="give longer texts",
            )
        if packing:
            self._items = packed(self._items, max_length)

    def _add(self, ids: list[int], labels: list[int]) -> None:
        self._items.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        return dict(self._items[index])


def _predicts(labels: Sequence[int]) -> bool:
    """Whether a label stands behind another token, from which it is predicted."""
    return any(label != IGNORED for label in labels[1:])


def _tell_cut(cut: int, conversations: int, max_length: int, *, nothing_left: bool) -> None:
    if nothing_left:
        raise DataError(
            "the length limit cuts every answer off",
            expected=f"a turn of the assistant within the first {max_length} tokens",
            got=f"none in {cut} conversation(s)",
            where="training: max_length",
            fix="raise it, or shorten what comes before the answers",
        )
    warnings.warn(
        f"{cut} of {conversations} conversations are left out: the assistant does not speak within their first "
        f"{max_length} tokens; raise max_length to keep them",
        UserWarning,
        stacklevel=3,
    )


def packed(items: Sequence[Item], max_length: int) -> list[Item]:
    """The items in fewer rows: each goes into the fullest row that has room for it, the longest first."""
    rows: list[list[Item]] = []
    room: list[int] = []
    for item in sorted(items, key=lambda item: -len(item["input_ids"])):
        length = len(item["input_ids"])
        best = min((row for row in range(len(rows)) if room[row] >= length), key=room.__getitem__, default=None)
        if best is None:
            best = len(rows)
            rows.append([])
            room.append(max_length)
        rows[best].append(item)
        room[best] -= length
    return [_joined(row) for row in rows]


def _joined(items: Sequence[Item]) -> Item:
    joined: Item = {"input_ids": [], "position_ids": [], "labels": []}
    for item in items:
        joined["input_ids"] += item["input_ids"]
        joined["position_ids"] += range(len(item["input_ids"]))
        joined["labels"] += [IGNORED, *item["labels"][1:]]  # the first token is not predicted from another conversation
    return joined


class LanguageCollator:
    """Pads items of a `LanguageDataset` on the right, to the longest.

    If an item is packed, the batch has `position_ids` and no attention mask; positions of padding are 0, which tells
    transformers' models that it belongs to no conversation. `task_ids` are kept.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.fill = {"input_ids": int(pad or 0), "attention_mask": 0, "position_ids": 0, "labels": IGNORED}

    def __call__(self, features: Sequence[Item]) -> dict[str, Tensor]:
        """Make one batch: LongTensors of shape (batch, length); `task_ids` (batch,)."""
        if any("position_ids" in feature for feature in features):
            features = [_placed(feature) for feature in features]
        length = max(len(feature["input_ids"]) for feature in features)
        batch = {
            key: torch.tensor([list(f[key]) + [fill] * (length - len(f[key])) for f in features])
            for key, fill in self.fill.items()
            if key in features[0]
        }
        if "task_ids" in features[0]:
            batch["task_ids"] = torch.tensor([feature["task_ids"] for feature in features])
        return batch


def _placed(feature: Item) -> Item:
    """An item with the positions of its tokens in place of an attention mask."""
    positions = {"position_ids": list(range(len(feature["input_ids"])))}
    return positions | {key: value for key, value in feature.items() if key != "attention_mask"}


__getattr__ = renamed(__name__, {"split_passages": "split_examples", "sample_passages": "sample_examples"})
