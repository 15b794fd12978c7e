"""What is remembered of heads: it is bounded, and nobody is answered with what another head says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waypoint import http1_head, request
from waypoint.messages import Fields, MessageError, RequestHead
from waypoint.remembered import MAX_KNOWN, MAX_REMEMBERED, Known, remembered

_NAMES = st.sampled_from([b"a", b"cookie", b"user-agent", b"x-request-id"])
_VALUES = st.sampled_from([b"", b"1", b"2", b"x" * MAX_KNOWN])
_FIELDS = st.lists(st.tuples(_NAMES, _VALUES), max_size=3)
_TARGETS = st.sampled_from(["/", "/a/../b", "/a?q=1"])


def _head(target: str, fields: Fields) -> bytes:
    lines = b"".join(b"%b: %b\r\n" % field for field in fields)
    return b"GET %b HTTP/1.1\r\nhost: x\r\n%b\r\n" % (target.encode(), lines)


@given(st.lists(st.tuples(_TARGETS, _FIELDS), max_size=8))
def test_every_head_is_read_as_if_it_were_the_first(heads: list[tuple[str, list[tuple[bytes, bytes]]]]) -> None:
    for target, fields in heads * 2:
        read = http1_head.read_request(_head(target, fields), b"")
        assert read == RequestHead("GET", target, [(b"host", b"x"), *fields])
        judged = request.read_request(read.method, read.target, read.fields)
        assert judged == request.read_request(read.method, read.target, list(read.fields))


def test_the_same_head_is_the_same_object_and_a_long_one_is_not_kept() -> None:
    short, long = _head("/", [(b"a", b"b")]), _head("/", [(b"a", b"b" * MAX_KNOWN)])
    assert http1_head.read_request(short, b"") is http1_head.read_request(bytes(bytearray(short)), b"")
    assert http1_head.read_request(long, b"") is not http1_head.read_request(long, b"")
    assert not isinstance(http1_head.read_request(long, b"").fields, Known)


def test_the_host_of_a_head_without_one_is_that_of_its_connection() -> None:
    old = b"GET / HTTP/1.0\r\n\r\n"
    for dialled in (b"a:1", b"b:2", b"a:1"):
        assert http1_head.read_request(old, dialled).fields == [(b"host", dialled)]


def test_what_is_refused_is_refused_again() -> None:
    for _ in range(3):
        with pytest.raises(MessageError, match="malformed"):
            http1_head.read_request(b"GET / HTTP/1.1\r\nhost: x\r\na b: c\r\n\r\n", b"")


def test_it_is_bounded_and_the_oldest_go() -> None:
    asked: list[bytes] = []

    @remembered
    def length(head: bytes) -> int:
        asked.append(head)
        return len(head)

    heads = [b"%d" % number for number in range(2 * MAX_REMEMBERED)]
    for head in heads * 2:
        assert length(head) == len(head)
    assert len(asked) == 4 * MAX_REMEMBERED
    asked.clear()
    for head in heads[-MAX_REMEMBERED:]:
        length(head)
    assert not asked


def test_fields_that_are_nobody_s_are_not_remembered() -> None:
    asked = 0

    @remembered
    def count(fields: Fields) -> int:
        nonlocal asked
        asked += 1
        return len(fields)

    known = Known([(b"a", b"b")])
    assert [count(known), count(known), count(list(known)), count(list(known))] == [1] * 4
    assert asked == 3
    assert known == [(b"a", b"b")]
