"""Regular expressions of others: matched as `re` does, in a time that grows with expression and text alone."""

from __future__ import annotations

import random
import re
import time

import pytest

from gatedadapters import patterns
from gatedadapters.patterns import Pattern

PIECES = ["a", "b", ".", r"\.", r"\d", r"\w", "[ab]", "[^a]", "[a-c1]", r"\b", "^", "$", "(?i:A)", r"\B", r"\Z"]
GROUPS = ["({})", "(?:{})", "({}|{})", "(?:{}|{}|)", "(?={})", "(?!{})", "(?<=a)", "(?<!b)"]
REPEATS = ["*", "+", "?", "{2}", "{1,3}", "{0,2}?", "{2,}", "*?", "+?"]


def drawn(chosen: random.Random, depth: int = 3) -> str:
    if depth == 0 or chosen.random() < 0.3:
        piece = chosen.choice(PIECES)
    elif chosen.random() < 0.5:
        piece = drawn(chosen, depth - 1) + drawn(chosen, depth - 1)
    else:
        form = chosen.choice(GROUPS)
        piece = form.format(*(drawn(chosen, depth - 1) for _ in range(form.count("{}"))))
    return f"(?:{piece}){chosen.choice(REPEATS)}" if chosen.random() < 0.3 else piece


@pytest.mark.parametrize("program_only", [False, True])
def test_matches_are_those_of_re(program_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if program_only:
        monkeypatch.setattr(patterns, "_tries_few_ways", lambda tree: False)
    chosen, matched = random.Random(0), 0
    for _ in range(800):
        text = drawn(chosen)
        try:
            oracle = re.compile(text)
        except re.error:
            continue
        pattern = Pattern(text)
        for _ in range(4):
            name = "".join(chosen.choices("ab.1A", k=chosen.randrange(7)))
            assert pattern.search(name) == (oracle.search(name) is not None), (text, name)
            assert pattern.fullmatch(name) == (oracle.fullmatch(name) is not None), (text, name)
            matched += pattern.fullmatch(name)
    assert matched > 150


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("(a|aa)+$", "a" * 200 + "b"),
        ("(a+)+$", "a" * 200 + "b"),
        (r"(\w+\s?)*!", "module name " * 20),
        (r"(.*)*x(.*)*y", "a" * 200),
        ("a?" * 100 + "a" * 100, "a" * 99),
        (r"(?:(a|a)*b)?" * 5 + "c", "ab" * 100),
        (".*.*.*.*.*x", "a" * 200),
        ("(?!(a|aa)+$)(a|aa)+b", "a" * 200),
        (".*.*x", "a" * 5000),
    ],
)
def test_catastrophic_expressions_are_matched_at_once(text: str, name: str) -> None:
    start = time.process_time()
    assert not Pattern(text).search(name)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("(", "not a regular expression"),
        ("a{99999999999999}", "not a regular expression"),
        ("((a{1000}){1000}){1000}", "more than 20,000 places"),
        ("(){1000000000}b*", "a repeat of more than 20,000"),
        ("(a{0,1000}){0,1000}", "more than 20,000 places"),
        ("(" * 3000 + "a" + ")" * 3000, "nested too deep"),
        ("a" * 70_000, "70,000 characters"),
        (r"(a)\1", "no references"),
        ("(a+)*+", "no references"),
        ("(?>a*)b", "no references"),
    ],
)
def test_expressions_that_cannot_be_matched_so_are_refused(text: str, says: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=says):
        Pattern(text)
    assert time.process_time() - start < 2


def test_many_texts_share_one_limit() -> None:
    pattern = Pattern("(" + "|".join(f"(a?){{{n}}}" for n in range(1, 60)) + ")*b")
    start = time.process_time()

    def match_all() -> None:
        for number in range(10_000):
            pattern.search("a" * 200 + str(number))

    with pytest.raises(ValueError, match="takes too long"):
        match_all()
    assert time.process_time() - start < 20


def test_expressions_in_use_go_to_re() -> None:
    for text in (
        r"(.*\.)?(q_proj|v_proj)$",
        r"layers\.[0-3]\.",
        "^(?!.*visual).*proj",
        "|".join(map(str, range(5000))),
    ):
        assert Pattern(text)._fast is not None
