"""Expressions of routes and the paths that callers choose (`control.api.expression`), beside Python's `re`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from control.api.expression import Expression

MAX_BYTES = 256
WORDS = (
    b"(?:", b"(?P<a>", b"(?<a>", b"|", b")*", b")+", b"){2,}", b"{0}", b"{1000}", b"{0,1}", b"[^", b"]", b"a-z", b"\\d",
    b"\\W", b"\\s", b"\\x41", b"\\.", b".*", b"^", b"$", b"\\$", b"()", b"*?", b"\xc3\xa9", b"\\v", b"-",
)  # fmt: skip
_SHORT_EXPRESSION, _SHORT_TEXT = 40, 12
"""Characters of what `re` is asked, which may try all ways to match."""


def seeds() -> Iterable[bytes]:
    for expression, text in (
        ("^/v[0-9]+/.*$", "/v1/x"),
        (r"/a\$", "/a$"),
        ("(?P<name>a|b)c", "bc"),
        *(("(?<name>a){2,3}?", "a" * count) for count in range(5)),
        *(("a{2,}", "a" * count) for count in range(4)),
        ("[]a]+[^]]", "]ab"),
        (r"(\w+)*=[\d.-]{1,}", "ab=1"),
        ("(a+)+b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"),
        (".*a.{30}b", "abababababababababababababababababababab"),
        ("((a?){2}|){0,3}", "aaaa"),
        ("((){1000}){1000}", ""),
    ):
        yield f"{expression}\n{text}".encode()


def check(data: bytes) -> None:
    """An expression, a line feed, and a text."""
    said, _, text = data.decode("utf-8", "replace").partition("\n")
    try:
        found = Expression(said)
    except ValueError:
        return
    matches = found.matches(text)
    assert found.matches(text) == matches, "what it remembers changes what it says"
    # RE2 does not count a vertical tab among white space.
    if len(said) > _SHORT_EXPRESSION or len(text) > _SHORT_TEXT or "\v" in text or re.search(r"\{\d{2}", said):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes that may mean more one day
            second = re.compile(said.replace("(?<", "(?P<"), re.ASCII)
    except (re.error, OverflowError):
        return
    assert matches == bool(second.fullmatch(text)), (said, text)
