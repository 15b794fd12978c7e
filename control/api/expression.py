"""Regular expressions whose matching takes time linear in the text, whatever expression and text are.

Whoever calls chooses the text, and Python's `re` goes back and tries again: one request could hold a waypoint for
minutes. What is read here is the part of RE2's syntax that says which texts there are
(https://github.com/google/re2/wiki/Syntax); a whole text matches, or it does not. Glushkov's automaton, made
deterministic as texts come.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, NoReturn

from control.api.problems import shown

MAX_POSITIONS: Final = 1000
"""Characters and classes of an expression, repetitions written out: RE2 gives up at some such size, too."""
_MAX_EDGES: Final = 20_000  # from one of them to the next
_MAX_DEPTH: Final = 50  # of groups
MAX_REMEMBERED: Final = 20_000  # steps, and positions in states, some 2 MB: a text can be made to need ever new ones
_LAST: Final = 0x10FFFF

_Ranges = tuple[tuple[int, int], ...]
"""Characters, from and to."""

_DIGIT: Final[_Ranges] = ((0x30, 0x39),)
_WORD: Final[_Ranges] = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Final[_Ranges] = ((0x09, 0x0A), (0x0C, 0x0D), (0x20, 0x20))
_CLASSES: Final = {"d": _DIGIT, "w": _WORD, "s": _SPACE}
_CONTROLS: Final = {"f": 0x0C, "n": 0x0A, "r": 0x0D, "t": 0x09, "v": 0x0B}


class Expression:
    """One expression, ready to be asked; `expression` makes it."""

    __slots__ = ("_automaton", "_first", "_remembered", "_states")

    def __init__(self, text: str) -> None:
        """Raises ValueError, which says what is wrong with it."""
        self._automaton = _Automaton(_Parser(text).whole())
        self._first = _State(self._automaton.first, self._automaton.empty)
        self._states: dict[tuple[frozenset[int], bool], _State] = {}
        self._remembered = 0

    def matches(self, text: str) -> bool:
        """Whether it describes the whole of a text."""
        state = self._first
        for character in text:
            state = state.following.get(character) or self._step(state, character)
            if not state.positions and not state.accepts:
                return False
        return state.accepts

    def _step(self, state: _State, character: str) -> _State:
        if self._remembered >= MAX_REMEMBERED:
            self._first.following.clear()
            self._states.clear()
            self._remembered = 0
        found = self._automaton.step(state.positions, ord(character))
        following = self._states.get(found)
        if following is None:
            following = self._states[found] = _State(*found)
            self._remembered += len(following.positions)
        state.following[character] = following
        self._remembered += 1
        return following


@lru_cache(maxsize=1024)
def expression(text: str) -> Expression:
    """The expression that a text is. Raises ValueError."""
    return Expression(text)


class _State:
    """Where in the expression a text may have come to: what may take its next character, and whether it may end."""

    __slots__ = ("accepts", "following", "positions")

    def __init__(self, positions: frozenset[int], accepts: bool) -> None:
        self.positions = positions
        self.accepts = accepts
        self.following: dict[str, _State] = {}


@dataclass(frozen=True, slots=True)
class _Part:
    """Some of an expression, as positions: where it begins and ends, and whether it describes nothing at all, too."""

    empty: bool
    first: frozenset[int]
    last: frozenset[int]


_NOTHING: Final = _Part(True, frozenset(), frozenset())
_Maker = Callable[["_Automaton"], _Part]
"""Adds a part to an automaton; called once for each time that it is repeated."""


class _Automaton:
    """`first` are the positions that may take the first character; a text ends well at one of the last."""

    def __init__(self, make: _Maker) -> None:
        self._characters: list[_Ranges] = []
        self._next: list[set[int]] = []
        self._edges = 0
        whole = make(self)
        self.first = whole.first
        self.empty = whole.empty
        self._last = whole.last

    def step(self, after: frozenset[int], character: int) -> tuple[frozenset[int], bool]:
        """What may take the character after this one, and whether the text may end with this one."""
        taken = [at for at in after if any(low <= character <= high for low, high in self._characters[at])]
        following = frozenset[int]().union(*(self._next[at] for at in taken))
        return following, not self._last.isdisjoint(taken)

    def add(self, characters: _Ranges) -> _Part:
        """One of these characters."""
        if len(self._characters) >= MAX_POSITIONS:
            raise ValueError(f"is longer than {MAX_POSITIONS} characters and classes, repetitions written out")
        at = frozenset((len(self._characters),))
        self._characters.append(characters)
        self._next.append(set())
        return _Part(False, at, at)

    def join(self, one: _Part, other: _Part) -> _Part:
        """One and then the other."""
        self.connect(one.last, other.first)
        return _Part(
            one.empty and other.empty,
            one.first | other.first if one.empty else one.first,
            one.last | other.last if other.empty else other.last,
        )

    def connect(self, last: frozenset[int], first: frozenset[int]) -> None:
        """These positions may come after those."""
        self._edges += len(last) * len(first)
        if self._edges > _MAX_EDGES:
            raise ValueError("repeats what may be empty or begin in many ways too often; make it simpler")
        for at in last:
            self._next[at] |= first


class _Parser:
    """Recursive descent, over one text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        # The whole text is compared anyway; RE2 takes these marks anywhere, and nobody writes them elsewhere.
        self._end = len(text)
        if text.startswith("^"):
            self._at = 1
        if text.endswith("$") and (len(text) - len(text[:-1].rstrip("\\"))) % 2:
            self._end -= 1

    def whole(self) -> _Maker:
        made = self._alternatives()
        if self._at < self._end:
            self._fail("')' closes no group")
        return made

    def _alternatives(self) -> _Maker:
        choices = [self._sequence()]
        while self._take("|"):
            choices.append(self._sequence())
        if len(choices) == 1:
            return choices[0]

        def make(automaton: _Automaton) -> _Part:
            parts = [choice(automaton) for choice in choices]
            return _Part(
                any(part.empty for part in parts),
                frozenset[int]().union(*(part.first for part in parts)),
                frozenset[int]().union(*(part.last for part in parts)),
            )

        return make

    def _sequence(self) -> _Maker:
        items: list[_Maker] = []
        while self._at < self._end and self._text[self._at] not in "|)":
            items.append(self._repeated())

        def make(automaton: _Automaton) -> _Part:
            part = _NOTHING
            for item in items:
                part = automaton.join(part, item(automaton))
            return part

        return make

    def _repeated(self) -> _Maker:
        item = self._one()
        if self._take("*"):
            low, high = 0, None
        elif self._take("+"):
            low, high = 1, None
        elif self._take("?"):
            low, high = 0, 1
        elif self._peek() == "{":
            low, high = self._counts()
        else:
            return item
        self._take("?")  # of two ways to find the same text, which is no question here
        if self._peek() and self._peek() in "*+?{":
            self._fail("repeats a repetition; put it in a group")
        return _repetition(item, low, high)

    def _counts(self) -> tuple[int, int | None]:
        closing = self._text.find("}", self._at, self._end)
        low, comma, high = self._text[self._at + 1 : closing].partition(",")
        numbers = [number for number in (low, high) if number]
        if closing < 0 or not low or not all(number in _COUNTS for number in numbers):
            self._fail("'{' begins no count, such as {2}, {2,} or {2,5}; write \\{ for the character")
        self._at = closing + 1
        if not comma:
            return int(low), int(low)
        if high and int(high) < int(low):
            self._fail(f"{{{low},{high}}} ends before it begins")
        return int(low), int(high) if high else None

    def _one(self) -> _Maker:
        character = self._next()
        if character == "(":
            return self._group()
        if character == "[":
            return _of(self._class())
        if character == ".":
            return _of(_without(((0x0A, 0x0A),)))
        if character == "\\":
            return _of(self._escape())
        if character in "*+?{":
            self._fail(f"{character!r} repeats nothing; write \\{character} for the character")
        if character in "^$":
            self._fail(f"{character!r} stands in the middle: the whole text is compared; remove it")
        return _of(((ord(character), ord(character)),))

    def _group(self) -> _Maker:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            self._fail(f"nests more than {_MAX_DEPTH} groups")
        if self._take("?") and not self._take(":"):
            self._take("P")
            closing = self._text.find(">", self._at, self._end)
            if not self._take("<") or self._peek() in ("=", "!") or closing < 0:
                self._fail("'(?' begins what is not there, as flags or a look ahead; write (...), (?:...) or (?<x>...)")
            self._at = closing + 1
        made = self._alternatives()
        if not self._take(")"):
            self._fail("a group has no ')'")
        self._depth -= 1
        return made

    def _escape(self) -> _Ranges:
        character = self._next("\\ stands at the end")
        if character.lower() in _CLASSES:
            found = _CLASSES[character.lower()]
            return found if character.islower() else _without(found)
        if character in _CONTROLS:
            return ((_CONTROLS[character], _CONTROLS[character]),)
        if character == "x":
            digits = self._text[self._at : min(self._at + 2, self._end)]
            if len(digits) != 2 or not all(digit in string.hexdigits for digit in digits):
                self._fail("\\x is not followed by two hexadecimal digits")
            self._at += 2
            return ((int(digits, 16), int(digits, 16)),)
        if character.isalnum() or not character.isascii():
            self._fail(f"\\{character} is not there; known are \\d \\w \\s \\D \\W \\S \\f \\n \\r \\t \\v \\x41")
        return ((ord(character), ord(character)),)

    def _class(self) -> _Ranges:
        negative = self._take("^")
        found: list[tuple[int, int]] = []
        while not (found and self._peek() == "]"):
            first = self._member()
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                last = self._member()
                if len(first) != 1 or len(last) != 1 or first[0][0] != first[0][1] or last[0][0] < first[0][0]:
                    self._fail("a range in [...] goes from one character to a later one")
                first = ((first[0][0], last[0][0]),)
            found += first
        self._at += 1
        return _without(tuple(found)) if negative else tuple(found)

    def _member(self) -> _Ranges:
        character = self._next("'[' has no ']'; write \\[ for the character")
        if character == "\\":
            return self._escape()
        if character == "[" and self._peek() in (":", "=", "."):
            self._fail("named classes, such as [:alpha:], are not there; write a-zA-Z")
        return ((ord(character), ord(character)),)

    def _peek(self) -> str:
        return self._text[self._at] if self._at < self._end else ""

    def _take(self, character: str) -> bool:
        if self._peek() != character:
            return False
        self._at += 1
        return True

    def _next(self, missing: str = "") -> str:
        if self._at >= self._end:
            self._fail(missing)
        self._at += 1
        return self._text[self._at - 1]

    def _fail(self, problem: str) -> NoReturn:
        raise ValueError(f"{shown(self._text)}: {problem}")


_COUNTS: Final = frozenset(map(str, range(MAX_POSITIONS + 1)))


def _of(characters: _Ranges) -> _Maker:
    return lambda automaton: automaton.add(characters)


def _repetition(item: _Maker, low: int, high: int | None) -> _Maker:
    """`low` times, and then up to `high` times, or as often as one likes."""

    def make(automaton: _Automaton) -> _Part:
        rest = _NOTHING
        if high is None:
            part = item(automaton)
            automaton.connect(part.last, part.first)
            rest = _Part(part.empty or not low, part.first, part.last)
        # The last of those that there must be is the one that goes on for ever.
        needed = low - (high is None and low > 0)
        for left in range((high or low) - low + needed, 0, -1):
            part = item(automaton)
            if not part.first:  # nothing, however often: what has no position is not bounded by their number
                return _NOTHING
            part = automaton.join(part, rest)
            rest = part if left <= needed else _Part(True, part.first, part.last)
        return rest

    return make


def _without(ranges: _Ranges) -> _Ranges:
    """All other characters."""
    found: list[tuple[int, int]] = []
    begin = 0
    for low, high in sorted(ranges):
        if low > begin:
            found.append((begin, low - 1))
        begin = max(begin, high + 1)
    if begin <= _LAST:
        found.append((begin, _LAST))
    return tuple(found)
