"""RESP as a Redis speaks it: any bytes are replies or an error, in whatever pieces they come."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.examples import examples
from waypoint.resp import MAX_BULK, MAX_ITEMS, MAX_LINE, ReplyError, RespError, RespReader, command

_words = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)
_replies = st.recursive(
    st.integers(-(2**62), 2**62) | st.binary(max_size=50) | st.none() | _words.map(ReplyError),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=10,
)


def written(reply: object) -> bytes:
    match reply:
        case None:
            return b"$-1\r\n"
        case int():
            return b":%d\r\n" % reply
        case bytes():
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        case ReplyError():
            return b"-%b\r\n" % str(reply).encode()
        case list():
            return b"*%d\r\n" % len(reply) + b"".join(map(written, reply))
    raise AssertionError(reply)


def shown(reply: object) -> object:
    if isinstance(reply, list):
        return [shown(one) for one in reply]
    return repr(reply)


@settings(max_examples=examples(200))
@given(st.lists(_replies, max_size=5), st.integers(1, 7))
def test_what_is_written_is_read_in_any_pieces(replies: list[object], size: int):
    data = b"".join(map(written, replies))
    reader = RespReader()
    found = [one for at in range(0, len(data), size) for one in reader.feed(data[at : at + size])]
    assert shown(found) == shown(replies)


def fed(data: bytes, size: int) -> tuple[object, bool]:
    reader, found = RespReader(), list[object]()
    try:
        for at in range(0, len(data), size):
            found += reader.feed(data[at : at + size])
    except RespError:
        return shown(found), True
    return shown(found), False


@settings(max_examples=examples(300))
@given(st.lists(st.sampled_from([b"*", b"$", b":", b"-", b"+", b"1", b"2", b"9", b"\r\n", b"a", b"\0"]), max_size=40))
def test_any_bytes_are_replies_or_an_error(pieces: list[bytes]):
    data = b"".join(pieces)
    whole, broken = fed(data, len(data) + 1)
    by_byte, broken_too = fed(data, 1)
    assert broken == broken_too
    if not broken:
        assert whole == by_byte


@pytest.mark.parametrize(
    "data",
    [
        b"$%d\r\n" % (MAX_BULK + 1),
        b"$-2\r\n",
        b"*%d\r\n" % (MAX_ITEMS + 1),
        b"*-2\r\n",
        b"*40\r\n*40\r\n",
        b"+" + b"x" * (MAX_LINE + 2),
        b":1x\r\n",
        b":\r\n",
        b":" + b"9" * 20 + b"\r\n",
        b"$1\r\nabc",
        b"HTTP/1.1 400\r\n",
    ],
)
def test_what_is_no_reply_or_too_large_is_an_error(data: bytes):
    with pytest.raises(RespError):
        RespReader().feed(data)


def test_a_command():
    assert command(b"GET", b"a\r\nb") == b"*2\r\n$3\r\nGET\r\n$4\r\na\r\nb\r\n"
