"""Regular expressions of others, matched in a time that grows with the expression and the text alone.

Python's `re` tries one way to match after another, and a short expression like `(a|aa)+$` has more ways than anyone can
wait for. Here every pair of a place in the expression and a place in the text is looked at once, in the manner of
Thompson; what cannot be matched like that (references to groups, possessive repeats) is refused.

References:
    Thompson 1968, "Regular Expression Search Algorithm", Communications of the ACM 11 (6).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from functools import lru_cache
from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
from typing import Any

MOST_CHARACTERS = 2**16  # of an expression; one that names 1,000 modules has 40,000
MOST_PLACES = 20_000  # in an expression, with all counted repeats written out
MOST_STEPS = 1_000_000  # of matches of one expression, in a row: about half a second
_STEPS_BACK = 50  # that each character of a text gives back: ordinary expressions take fewer, and never run out
_MANY = 1_000
_SHORT = 256  # characters of a text; names of modules have about 60
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)
_CHARACTERS = (_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN)
_UNSUPPORTED = "use no references to groups, conditions, possessive repeats or atomic groups"


class Pattern:
    """A regular expression in the syntax of Python's `re`.

    Args:
        text: the expression.

    Raises:
        ValueError: it is not valid, too large, or refers to groups.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"a regular expression of {len(text):,} characters; at most {MOST_CHARACTERS:,} are read")
        self._left = MOST_STEPS
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of forms that a later Python may read otherwise
                tree = _parser.parse(text)
                self._fast = re.compile(text) if _tries_few_ways(tree) else None
            self._program = None if self._fast is not None else _Program(tree)
        except (re.error, OverflowError) as error:
            raise ValueError(f"not a regular expression: {error}") from None
        except RecursionError:
            raise ValueError("a regular expression that is nested too deep") from None
        self._text, self._tree = text, tree

    def search(self, text: str) -> bool:
        """Whether it matches anywhere in `text`.

        Raises:
            ValueError: matching takes too long.
        """
        fast = self._fast_for(text)
        return self._run(text, anywhere=True, whole=False) if fast is None else fast.search(text) is not None

    def fullmatch(self, text: str) -> bool:
        """Whether it matches the whole of `text`.

        Raises:
            ValueError: matching takes too long.
        """
        fast = self._fast_for(text)
        return self._run(text, anywhere=False, whole=True) if fast is None else fast.fullmatch(text) is not None

    def _fast_for(self, text: str) -> re.Pattern[str] | None:
        """What `re` makes of the expression, if it matches this text at once."""
        return self._fast if len(text) <= _SHORT else None

    def _run(self, text: str, *, anywhere: bool, whole: bool) -> bool:
        self._program = self._program or _Program(self._tree)
        self._left = min(MOST_STEPS, self._left + _STEPS_BACK * (len(text) + 1))
        run = _Run(self._program, text, self._left)
        try:
            return run.reaches(self._program.start, 0, anywhere=anywhere, whole=whole)
        except _TooLongError:
            short = self._text if len(self._text) <= 100 else f"{self._text[:100]}..."
            raise ValueError(f"matching {short!r} takes too long: it tries too many ways") from None
        finally:
            self._left = run.left


def _tries_few_ways(tree: Iterable[Any], room: int = 2) -> bool:
    """Whether `re` matches a short text at once: at most `room` repeats in a row vary, each of a single character."""
    return _varying(tree) <= room


def _varying(tree: Iterable[Any]) -> int:
    """The most repeats that vary on one way through the expression; `_MANY` for what may try many ways."""
    found = 0
    for kind, value in tree:
        if kind in _REPEATS:
            low, high, body = value
            single = len(body) == 1 and body[0][0] in _CHARACTERS
            if single:
                found += low != high
            elif (low, high) == (0, 1):
                found += 1 + _varying(body)
            else:
                return _MANY
        elif kind is _constants.SUBPATTERN:
            found += _varying(value[3])
        elif kind is _constants.BRANCH:
            found += max(map(_varying, value[1]))
        elif kind in (_constants.ASSERT, _constants.ASSERT_NOT):
            found += _varying(value[1])
        elif kind not in (*_CHARACTERS, _constants.AT):
            return _MANY
    return found


class _Program:
    """An expression as places with arrows: a place reads one character, branches, or checks where it is."""

    def __init__(self, tree: Any) -> None:
        self.places: list[tuple[str, Any, tuple[int, ...]]] = [("end", None, ())]
        self._known: dict[str, Any] = {}
        self.start = self._sequence(tree, tree.state, tree.state.flags, 0)

    def _add(self, kind: str, value: Any, *then: int) -> int:
        if len(self.places) >= MOST_PLACES:
            raise ValueError(f"a regular expression with more than {MOST_PLACES:,} places, all repeats written out")
        self.places.append((kind, value, then))
        return len(self.places) - 1

    def _sequence(self, nodes: Any, state: Any, flags: int, then: int) -> int:
        """The first place of `nodes`, which is built from the end: what follows is `then`."""
        for kind, value in reversed(list(nodes)):
            then = self._one(kind, value, state, flags, then)
        return then

    def _one(self, kind: Any, value: Any, state: Any, flags: int, then: int) -> int:
        if kind in _CHARACTERS:
            return self._add("read", self._compiled((kind, value), state, flags, _reader), then)
        if kind is _constants.AT:
            return self._add("at", self._compiled((kind, value), state, flags, _checker), then)
        if kind is _constants.SUBPATTERN:
            _, more, less, body = value
            return self._sequence(body, state, (flags | more) & ~less, then)
        if kind is _constants.BRANCH:
            return self._add("branch", None, *(self._sequence(body, state, flags, then) for body in value[1]))
        if kind in _REPEATS:
            low, high, body = value
            return self._repeat(low, high, body, state, flags, then)
        if kind in (_constants.ASSERT, _constants.ASSERT_NOT):
            direction, body = value
            back = body.getwidth()[0] if direction < 0 else 0
            looked = self._sequence(body, state, flags, 0)
            return self._add("look", (looked, back, kind is _constants.ASSERT), then)
        raise ValueError(f"{str(kind).lower()} in a regular expression of others; {_UNSUPPORTED}")

    def _repeat(self, low: int, high: int, body: Any, state: Any, flags: int, then: int) -> int:
        if low > MOST_PLACES or (high is not _constants.MAXREPEAT and high > MOST_PLACES):
            raise ValueError(f"a repeat of more than {MOST_PLACES:,} in a regular expression")
        if high is _constants.MAXREPEAT:
            loop = self._add("branch", None)
            self.places[loop] = ("branch", None, (self._sequence(body, state, flags, loop), then))
            then = loop
        else:
            end = then
            for _ in range(high - low):
                then = self._add("branch", None, self._sequence(body, state, flags, then), end)
        for _ in range(low):
            then = self._sequence(body, state, flags, then)
        return then

    def _compiled(self, node: Any, state: Any, flags: int, use: Callable[[re.Pattern[str]], Any]) -> Any:
        """A node that reads one character or none, as `re` understands it."""
        key = f"{flags} {node}"
        if key not in self._known:
            self._known[key] = use(_compiler.compile(_parser.SubPattern(state, [node]), flags))
        return self._known[key]


class _TooLongError(Exception):
    """The steps are used up."""


class _Run:
    """One text under one program.

    Args:
        program: the expression.
        text: the text.
        left: number of steps that may still be taken.
    """

    def __init__(self, program: _Program, text: str, left: int) -> None:
        self.places, self.text, self.left = program.places, text, left
        self._looked: dict[tuple[int, int], bool] = {}

    def reaches(self, start: int, at: int, *, anywhere: bool, whole: bool) -> bool:
        """Whether the end can be reached from place `start` at character `at`.

        Args:
            start: the place.
            at: position in the text.
            anywhere: whether a match may also begin further on.
            whole: whether it must end where the text ends.
        """
        waiting: list[int] = []
        for position in range(at, len(self.text) + 1):
            if anywhere or position == at:
                waiting.append(start)
            if not waiting:
                return False
            following: list[int] = []
            seen: set[int] = set()
            while waiting:
                place = waiting.pop()
                if place in seen:
                    continue
                seen.add(place)
                self.left -= 1
                if self.left < 0:
                    raise _TooLongError
                kind, value, then = self.places[place]
                if kind == "end":
                    if not whole or position == len(self.text):
                        return True
                elif kind == "branch":
                    waiting += then
                elif kind == "read":
                    if position < len(self.text) and value(self.text[position]):
                        following += then
                elif self._holds(kind, value, position):
                    waiting += then
            waiting = following
        return False

    def _holds(self, kind: str, value: Any, position: int) -> bool:
        if kind == "at":
            found: bool = value(self.text, position)
            return found
        start, back, wanted = value
        key = start, position
        if key not in self._looked:
            begin = position - back
            self._looked[key] = begin >= 0 and self.reaches(start, begin, anywhere=False, whole=False)
        return self._looked[key] is wanted


def _reader(compiled: re.Pattern[str]) -> Callable[[str], bool]:
    return lru_cache(maxsize=256)(lambda character: compiled.match(character) is not None)


def _checker(compiled: re.Pattern[str]) -> Callable[[str, int], bool]:
    return lambda text, position: compiled.match(text, position) is not None
