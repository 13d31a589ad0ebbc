"""Conversations: reading them, and finding the tokens of the assistant's turns in what the tokenizer's template writes.

A template that marks what the assistant says with `{% generation %}` tells the answers itself. With any other template
they are found by comparing texts:

- An answer begins where the text that a model is prompted with ends: the messages before it and the generation prompt.
- It ends where the conversation, rendered up to this answer, ends.
- Some templates write earlier messages in another way than the last ones: they drop a train of thought, or move the
  system message. Where the whole conversation does not begin with such a text, the answer is replaced by two others
  that differ in their first and last letter. What stays the same before and after it is not the answer. The special
  token behind it, which ends the turn, belongs to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from gatedadapters.data.tasks import Conversation, Message
from gatedadapters.errors import DataError

IGNORED = -100
ROLES = ("system", "user", "assistant")
_STAND_INS = ("Qanswer1q", "Zanswer2z")


def read_conversation(cell: object, where: str) -> Conversation:
    """The conversation in a cell.

    Args:
        cell: a list of records with `role` and `content`.
        where: file, line and column, for errors.

    Raises:
        DataError: the cell holds no such list, a message has no text, or the roles are out of order.
    """
    if isinstance(cell, (str, Mapping)) or not isinstance(cell, Sequence) or not cell:
        raise DataError(
            "a cell is not a conversation",
            expected="a list of messages with role and content",
            got=f"{cell!r:.80}",
            where=where,
            fix='write it as JSON: [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
        )
    return checked([_message(value, f"{where}, message {number}") for number, value in enumerate(cell)], where)


def _message(value: object, where: str) -> Message:
    role = value.get("role") if isinstance(value, Mapping) else None
    content = value.get("content") if isinstance(value, Mapping) else None
    if role not in ROLES or not isinstance(content, str):
        raise DataError(
            "this is not a message",
            expected=f"a role ({', '.join(ROLES)}) and a content that is text",
            got=f"{value!r:.80}",
            where=where,
            fix="turns of tools and pictures are not read: leave such conversations out",
        )
    if role == "assistant" and not content.strip():
        raise DataError(
            "a turn of the assistant is empty",
            expected="an answer",
            got=repr(content),
            where=where,
            fix="fill the turn, or leave the conversation out",
        )
    return Message(str(role), content)


def checked(messages: Sequence[Message], where: str) -> Conversation:
    """The conversation of messages.

    Raises:
        DataError: the roles are out of order.
    """
    turns = [message.role for message in messages]
    body = turns[1:] if turns[:1] == ["system"] else turns
    wanted = [("user", "assistant")[number % 2] for number in range(len(body))]
    wrong = next((n for n, (got, want) in enumerate(zip(body, wanted, strict=True)) if got != want), None)
    if wrong is not None:
        place = wrong + len(turns) - len(body)
        raise DataError(
            "the roles of a conversation are out of order",
            expected=f"{wanted[wrong]}: one system message at most, then user and assistant by turns",
            got=turns[place],
            where=f"{where}, message {place}",
            fix="join messages of one role that follow each other, or leave the conversation out",
        )
    if turns[-1] != "assistant":
        raise DataError(
            "a conversation ends without an answer",
            expected="a turn of the assistant at its end",
            got=turns[-1],
            where=f"{where}, message {len(turns) - 1}",
            fix="drop the messages after the last answer",
        )
    return Conversation(tuple(messages))


def conversation_tokens(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Tokens of a conversation, and labels: the tokens of the assistant's turns, and -100 elsewhere.

    Raises:
        DataError: the tokenizer has no chat template, or the template refuses the conversation or does not tell where
            its answers lie.
    """
    messages = [message._asdict() for message in conversation.messages]
    template = tokenizer.chat_template
    if not template:
        raise DataError(
            "the tokenizer has no chat template",
            expected="a tokenizer of a model that was trained to chat",
            got="a tokenizer without one",
            where=f"tokenizer {tokenizer.name_or_path!r}",
            fix="give such a model; or set tokenizer.chat_template and save the tokenizer beside the model; or make "
            "the data a table of questions and answers, kind: text",
        )
    if not tokenizer.is_fast:
        raise DataError(
            "this tokenizer does not tell which text its tokens stand for",
            expected="a fast tokenizer",
            got=type(tokenizer).__name__,
            where=f"tokenizer {tokenizer.name_or_path!r}",
            fix="save it with its tokenizer.json: AutoTokenizer.from_pretrained(..., use_fast=True)",
        )
    if "{% generation" in str(template) or "{%- generation" in str(template):
        encoded: Any = _rendered(
            tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = list(encoded["input_ids"]), encoded["assistant_masks"]
        if any(mask):
            return ids, [token if own else IGNORED for token, own in zip(ids, mask, strict=True)]
    text = _text(tokenizer, messages)
    spans = [
        _answer_span(tokenizer, messages, number, text)
        for number, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels, next_spans = list(found["input_ids"]), list[int](), iter(spans)
    start, end = next(next_spans)
    for token, (first, last) in zip(ids, found["offset_mapping"], strict=True):
        while first >= end:
            start, end = next(next_spans, (len(text) + 1, len(text) + 1))
        labels.append(token if max(first, start) < min(last, end) else IGNORED)
    return ids, labels


def _answer_span(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], number: int, text: str
) -> tuple[int, int]:
    """Where in `text`, the whole conversation, the answer in message `number` begins and ends."""
    before = _text(tokenizer, messages[:number], add_generation_prompt=True)
    until = _text(tokenizer, messages[: number + 1])
    start = len(before) if text.startswith(before) else None
    end = len(until) if text.startswith(until) else None
    if start is not None and end is not None and start < end:
        return start, end
    first, last = _compared(tokenizer, messages, number, text)
    if start is None or start > first:
        start = first
    return start, _after_special_token(tokenizer, text, last)


def _compared(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], number: int, text: str
) -> tuple[int, int]:
    """Where the content of message `number` begins and ends in `text`, by what stays when it is another."""
    changed = [
        _text(tokenizer, [*messages[:number], {**messages[number], "content": other}, *messages[number + 1 :]])
        for other in _STAND_INS
    ]
    one, other = changed
    first, rest = _shared(one, other), _shared(one[::-1], other[::-1])
    same = text[:first] == changed[0][:first] and text[len(text) - rest :] == changed[0][len(changed[0]) - rest :]
    if (
        not same
        or first >= len(text) - rest
        or any(stand_in not in one for stand_in, one in zip(_STAND_INS, changed, strict=True))
    ):
        raise DataError(
            "the chat template does not tell where the answers lie",
            expected="a template that writes every answer in one piece",
            got=f"message {number} of {len(messages)} could not be found in the text",
            where=f"tokenizer {tokenizer.name_or_path!r}: chat_template",
            fix="mark the assistant's text in it with {% generation %} ... {% endgeneration %}",
        )
    return first, len(text) - rest


def _shared(one: str, other: str) -> int:
    """The number of characters that both texts begin with."""
    return next((at for at, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), len(one))


def _after_special_token(tokenizer: PreTrainedTokenizerBase, text: str, at: int) -> int:
    """The end of the special token that follows `at`, behind white space or not; `at` if none does."""
    start = at + len(text[at:]) - len(text[at:].lstrip())
    ends = [start + len(token) for token in tokenizer.all_special_tokens if text.startswith(token, start)]
    return max(ends, default=at)


def _text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> str:
    return str(_rendered(tokenizer, messages, tokenize=False, **options))


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        raise DataError(
            "the chat template refuses a conversation",
            expected="messages that the template knows how to write",
            got=f"{error} (roles: {', '.join(message['role'] for message in messages)})",
            where=f"tokenizer {tokenizer.name_or_path!r}: chat_template",
            fix="many templates know no system message: put its text into the first user message",
        ) from error
