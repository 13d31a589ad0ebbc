"""Passwords, tokens and control characters are not shown."""

from __future__ import annotations

import time
import traceback

import pytest

from gatedadapters import redaction
from gatedadapters.errors import StudyError
from gatedadapters.redaction import redacted, remember

MARK = "S3cretMARK"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"storage postgresql://user:{MARK}@host:1/x", "storage postgresql://user:***@host:1/x"),
        (f"postgresql+psycopg://user:a@{MARK}/b:c@host", "postgresql+psycopg://user:***@host"),
        (f"postgresql://user:{MARK}", "postgresql://user:***"),
        ("http://localhost:6006/x and grpc://host:1", "http://localhost:6006/x and grpc://host:1"),
        (f"mysql://host/x?pw={MARK}&charset=utf8", "mysql://host/x?pw=***&charset=utf8"),
        (f"x://h?password={MARK}", "x://h?password=***"),
        (f"x://h?sslpassword={MARK}", "x://h?sslpassword=***"),
        (f"host=h password={MARK} dbname=x", "host=h password=*** dbname=x"),
        (f"{{'user': 'u', 'password': '{MARK}'}}", "{'user': 'u', 'password': '***'}"),
        (f"TrainingArguments(hub_token='{MARK}', seed=1)", "TrainingArguments(hub_token='***', seed=1)"),
        (f"grpc://user:{MARK}@host:1", "grpc://user:***@host:1"),
        (f"https://{MARK}@huggingface.co/a/b", "https://***@huggingface.co/a/b"),
        ("401: hf_abcDEF1234567890 is invalid", "401: *** is invalid"),
        ("Authorization: Bearer abc.def-123456", "Authorization: Bearer ***"),
        ("\x1b[31mred\x00 \u202etxt", "\\x1b[31mred\\x00 \\u202etxt"),
    ],
)
def test_secrets_are_hidden_and_the_rest_stays(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "the key 'password' stands twice",
        "fix:      pass budget= here",
        "pad_token=x, max_tokens=5, tokenizer: bert, monkey: 3",
        "block 3, ffn.down: expected (4, 8)\n  got: https://example.org/a",
        "user@example.org",
    ],
)
def test_ordinary_messages_stay_as_they_are(text: str) -> None:
    assert redacted(text) == text


def test_a_remembered_secret_is_found_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_known", set())
    remember("postgresql://user:p%40ss%20wordMARK@host/x?sslpassword=otherMARK&a=abc")
    assert redacted("it said 'p@ss wordMARK', otherMARK and abc") == "it said '***', *** and abc"


def test_the_token_of_the_environment_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", MARK)
    assert redacted(f"sent {MARK}") == "sent ***"


def test_errors_show_no_secret_in_any_form() -> None:
    url = f"x://u:{MARK}@h"
    error = StudyError(f"no {url}", expected=f"password={MARK}", got=ValueError(url), where=url)
    told = "".join(traceback.format_exception(error))
    for form in (str(error), repr(error), str(error.args), str(error.where), told):
        assert MARK not in form


def test_a_long_word_takes_no_longer_than_its_length() -> None:
    start = time.process_time()
    assert redacted("x" * 300_000) == "x" * 300_000
    assert time.process_time() - start < 2
