"""Conversations: which tokens are learned, under whatever template, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_runs import CHATML, chat_tokenizer
from transformers import PreTrainedTokenizerFast

from gatedadapters.data import Conversation, LanguageDataset, Message
from gatedadapters.data.chat import IGNORED, checked, conversation_tokens, read_conversation
from gatedadapters.errors import DataError

TALK = Conversation(
    (
        Message("system", "be short"),
        Message("user", "what does the dog"),
        Message("assistant", "runs, runs"),
        Message("user", "and the cat ?"),
        Message("assistant", "sleeps today ☾"),
    )
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<s>assistant\n"
    "{% generation %}{{ m.content }}</s>\n{% endgeneration %}"
    "{% else %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# Thoughts stay in the last turn alone, as in reasoning models, where an empty thought is written if there is none.
THINKS = (
    "{% for m in messages %}<s>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content.split('</think>')[-1] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# The system message stands in front of the last message of the user.
MOVES = (
    "{% set at = namespace(user=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set at.user = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'user' %}[ {% if loop.index0 == at.user %}"
    "{{ messages[0].content }} {% endif %}{{ m.content }} ]{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% endif %}{% endfor %}"
)
# No special token, no prompt for an answer, and an end that only the whole conversation has.
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ eos_token }}"


def learned(tokenizer: PreTrainedTokenizerFast, conversation: Conversation = TALK) -> list[str]:
    """The text of every run of labelled tokens."""
    ids, labels = conversation_tokens(conversation, tokenizer)
    assert [label for label in labels if label != IGNORED] == [
        token for token, label in zip(ids, labels, strict=True) if label != IGNORED
    ]
    runs: list[list[int]] = [[]]
    for label in labels:
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        pytest.param(CHATML, ["runs, runs</s>\n", "sleeps today ☾</s>\n"], id="chatml"),
        pytest.param(MARKED, ["runs, runs</s>\n", "sleeps today ☾</s>\n"], id="marked"),
        pytest.param(THINKS, ["runs, runs</s>", "<think></think>sleeps today ☾</s>\n"], id="thoughts"),
        pytest.param(MOVES, [" runs, runs</s>", " sleeps today ☾</s>"], id="moves the system message"),
        pytest.param(PLAIN, [" runs, runs", " sleeps today ☾\n</s>"], id="no generation prompt"),
    ],
)
def test_what_the_assistant_says_is_learned_and_nothing_else(template: str, expected: list[str]) -> None:
    assert learned(chat_tokenizer(template)) == expected


def test_a_template_without_marks_teaches_what_the_same_template_with_marks_does() -> None:
    """The marks are transformers' own account of what the assistant says."""
    with_marks, without = (conversation_tokens(TALK, chat_tokenizer(template)) for template in (MARKED, CHATML))
    assert with_marks == without


def test_the_prompt_of_an_answer_is_not_learned_and_is_what_a_model_is_given() -> None:
    tokenizer = chat_tokenizer()
    ids, labels = conversation_tokens(TALK, tokenizer)
    last = max(at for at, label in enumerate(labels) if label == IGNORED) + 1
    prompt = tokenizer.apply_chat_template(
        [message._asdict() for message in TALK.messages[:-1]], add_generation_prompt=True, return_dict=True
    )
    assert ids[:last] == prompt["input_ids"]


def message(role: Any, content: Any = "the dog") -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("cell", "named"),
    [
        ([message("assistant")], r"out of order.*expected: user.*got: +assistant.*message 0"),
        ([message("user"), message("user")], r"out of order.*expected: assistant.*message 1"),
        ([message("user"), message("assistant"), message("assistant")], r"out of order.*message 2"),
        ([message("user"), message("system"), message("assistant")], r"out of order.*got: +system.*message 1"),
        ([message("system"), message("assistant")], r"out of order.*message 1"),
        ([message("user"), message("assistant"), message("user")], r"without an answer.*message 2"),
        ([message("system")], r"without an answer"),
        ([message("user"), message("assistant", " ")], r"is empty.*message 1"),
        ([message("tool")], r"not a message.*tool"),
        ([message("user", None)], r"not a message"),
        ([message("user", [{"type": "image"}])], r"not a message.*pictures"),
        ([{"from": "human", "value": "the dog"}], r"not a message.*role"),
        (["the dog"], r"not a message"),
        ([], r"not a conversation"),
        ("the dog", r"not a conversation.*JSON"),
        (3, r"not a conversation"),
    ],
)
def test_a_conversation_that_cannot_be_learned_is_refused_by_message(cell: object, named: str) -> None:
    with pytest.raises(DataError, match=rf"(?s){named}") as refused:
        read_conversation(cell, "talk.jsonl, line 7")
    assert "talk.jsonl, line 7" in str(refused.value)


def test_a_tokenizer_without_a_template_is_refused_with_a_remedy_that_works() -> None:
    tokenizer = chat_tokenizer(None)
    with pytest.raises(DataError, match=r"(?s)no chat template.*set tokenizer\.chat_template"):
        conversation_tokens(TALK, tokenizer)
    tokenizer.chat_template = CHATML
    assert learned(tokenizer)


def test_what_a_template_refuses_is_named() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"(?s)refuses.*no system message.*first user message"):
        conversation_tokens(TALK, chat_tokenizer(refusing))
    assert learned(chat_tokenizer(refusing), checked(TALK.messages[1:], "here"))


def test_a_template_in_which_answers_cannot_be_found_is_refused() -> None:
    backwards = "{% for m in messages %}{{ m.role }} {{ m.content[::-1] }}\n{% endfor %}{{ eos_token }}"
    with pytest.raises(DataError, match=r"(?s)does not tell where the answers lie.*generation"):
        conversation_tokens(TALK, chat_tokenizer(backwards))


def test_answers_that_the_length_limit_cuts_off_are_told_and_refused_if_none_is_left() -> None:
    tokenizer = chat_tokenizer()
    long = Conversation((Message("user", "the dog runs " * 20), Message("assistant", "today")))
    with pytest.raises(DataError, match=r"(?s)cuts every answer off.*first 24 tokens.*none in 1 .*max_length"):
        LanguageDataset([long], tokenizer, 24)
    short = Conversation((Message("user", "the dog"), Message("assistant", "runs")))
    with pytest.warns(UserWarning, match="1 of 2 conversations are left out"):
        data = LanguageDataset([short, long], tokenizer, 24)
    assert len(data) == 1
    assert len(LanguageDataset([short, long], tokenizer, 200)) == 2
