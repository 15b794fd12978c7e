"""Requests and responses that another parser could read in another way are refused, however they are cut up."""

from __future__ import annotations

import time

import pytest

from tests.support.http1_vectors import OTHERWISE_REFUSED, REFUSED, TAKEN, request
from waypoint.http1 import (
    CHUNKED,
    END,
    UNTIL_CLOSE,
    End,
    MessageError,
    RequestHead,
    RequestReader,
    RequestWriter,
    ResponseHead,
    ResponseReader,
    ResponseWriter,
    length,
)

STEPS = (1, 7, 1 << 20)


def read(data: bytes, step: int) -> list[object]:
    reader = RequestReader(b"dialled:1")
    events: list[object] = []
    for at in range(0, len(data), step):
        events += reader.feed(data[at : at + step])
    return events


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_read_in_two_ways(name: str, step: int) -> None:
    with pytest.raises(MessageError) as refused:
        read(REFUSED[name], step)
    assert refused.value.status == 400


@pytest.mark.parametrize("step", [7, 1 << 20])
@pytest.mark.parametrize("name", OTHERWISE_REFUSED)
def test_what_is_refused_with_a_status_of_its_own(name: str, step: int) -> None:
    status, data = OTHERWISE_REFUSED[name]
    with pytest.raises(MessageError) as refused:
        read(data, step)
    assert refused.value.status == status


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken(name: str, step: int) -> None:
    events = read(TAKEN[name], step)
    assert isinstance(events[0], RequestHead)
    assert [isinstance(event, End) for event in events] == [False] * (len(events) - 1) + [True]


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_comes_after_a_refusal(name: str) -> None:
    reader = RequestReader(b"dialled:1")
    with pytest.raises(MessageError):
        reader.feed(REFUSED[name])
    assert reader.feed(request(line=b"GET /after HTTP/1.1")) == []
    with pytest.raises(MessageError):
        reader.eof()


def test_a_malformed_second_request() -> None:
    reader = RequestReader(b"dialled:1")
    assert reader.feed(request(b"Content-Length: 0") + b"GARBAGE\r\n\r\n")[-1] is END
    with pytest.raises(MessageError):
        reader.proceed()


@pytest.mark.parametrize(
    ("status", "data"),
    [
        (400, b"GET /\r\n"),
        (400, b"get / HTTP/1.1\r\nHost: a\r\n"),
        (400, b"\x16\x03\x01\x02\x00\x01\n"),
        (400, b"PRI * HTTP/2.0\r\n"),
        (414, b"GET /" + b"a" * 16384),
        (431, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 11000),
        (431, b"GET / HTTP/1.1\r\nX: " + b"y" * 65536),
    ],
)
@pytest.mark.parametrize("before", [b"", request(b"Content-Length: 0")])
def test_a_head_that_can_only_be_refused_is_not_waited_for(status: int, data: bytes, before: bytes) -> None:
    reader = RequestReader(b"dialled:1")
    if before:
        reader.feed(before[:20])
        reader.feed(before[20:])
        reader.proceed()
    with pytest.raises(MessageError) as refused:
        reader.feed(data)
    assert refused.value.status == status


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", "start line"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n", "line 2 after the start line"),
        (b"GET / HTTP/1.1\r\n\r\n", "0 Host fields"),
        (request(b"X_Forwarded_For: 1"), "x_forwarded_for could be taken for x-forwarded-for"),
    ],
)
def test_a_refusal_says_what_is_wrong(head: bytes, says: str) -> None:
    with pytest.raises(MessageError, match=says):
        read(head, 1 << 20)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: y\r\n" * 9000 + b"X\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x" * 65000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b" \t" * 32000 + b"\0\r\n\r\n",
        b"A-" * 32000 + b" / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nConnection: " + b"," * 65000 + b";\r\nHost: a\r\n\r\n",
    ],
)
def test_a_hostile_head_takes_no_more_time_than_a_long_one(head: bytes) -> None:
    began = time.process_time()
    with pytest.raises(MessageError):
        read(head, 1 << 20)
    assert time.process_time() - began < 0.2


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "response",
    [
        b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
        b"HTTP/1.1 200 OK\r\nX: y\nZ: a\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: y\r\n z\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length : 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 099 No\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1  200 OK\r\n\r\n",
        b"HTTP/1.1 200\tOK\r\n\r\n",
        b"HTTP/1.1 200 O\0K\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1200 OK\r\n\r\n",
        b"\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n\0",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 65536 + b"\r\n\r\n",
    ],
)
def test_responses(response: bytes, step: int) -> None:
    reader = ResponseReader()
    reader.expect("GET")
    with pytest.raises(MessageError) as refused:  # noqa: PT012 - some at the end only
        for at in range(0, len(response), step):
            reader.feed(response[at : at + step])
        reader.eof()
    assert refused.value.status == 502
    assert not reader.reusable
    assert reader.feed(b"HTTP/1.1 200 OK\r\n\r\n") == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"content-length", b"5"),
        (b"transfer-encoding", b"chunked"),
        (b"connection", b"close"),
        (b"upgrade", b"h2c"),
        (b"Content-Length", b"5"),
        (b"x y", b"z"),
        (b"", b"z"),
        (b"x", b"y\r\nz: a"),
        (b"x", b"y\nz: a"),
        (b"x", b"\0"),
        (b"x\r\ny", b"z"),
    ],
)
def test_fields_that_writers_do_not_write(name: bytes, value: bytes) -> None:
    asked = RequestHead("POST", "/", [(b"host", b"a"), (name, value)], length(5))
    with pytest.raises(ValueError, match=r"field|malformed"):
        RequestWriter().head(asked)
    with pytest.raises(ValueError, match=r"field|malformed"):
        ResponseWriter(RequestHead("GET", "/", [(b"host", b"a")])).head(ResponseHead(200, b"OK", [(name, value)]))


@pytest.mark.parametrize(
    "request_head",
    [
        RequestHead("GET / HTTP/1.1\r\nX:", "/", [(b"host", b"a")]),
        RequestHead("", "/", [(b"host", b"a")]),
        RequestHead("GET", "", [(b"host", b"a")]),
        RequestHead("GET", "/ HTTP/1.1\r\nX: y", [(b"host", b"a")]),
        RequestHead("GET", "/a b", [(b"host", b"a")]),
        RequestHead("GET", "/", []),
        RequestHead("GET", "/", [(b"host", b"a"), (b"host", b"a")]),
        RequestHead("POST", "/", [(b"host", b"a")], UNTIL_CLOSE),
    ],
)
def test_heads_that_are_not_written(request_head: RequestHead) -> None:
    with pytest.raises(ValueError, match=r"malformed|host|end"):
        RequestWriter().head(request_head)


def test_bodies_are_as_long_as_their_heads_say() -> None:
    asked = RequestHead("POST", "/", [(b"host", b"a")], length(5))
    longer, shorter = RequestWriter(), RequestWriter()
    longer.head(asked)
    with pytest.raises(ValueError, match="longer"):
        longer.body(b"hello!")
    shorter.head(asked)
    shorter.body(b"hell")
    with pytest.raises(ValueError, match="shorter"):
        shorter.end()


def test_a_request_that_is_cut_off() -> None:
    whole = RequestWriter()
    data = whole.head(RequestHead("POST", "/", [(b"host", b"a")], CHUNKED)) + whole.body(b"hello") + whole.end()
    for cut in range(1, len(data)):
        reader = RequestReader(b"dialled:1")
        reader.feed(data[:cut])
        with pytest.raises(MessageError, match="cut off"):
            reader.eof()
        assert reader.feed(data[cut:]) == []


@pytest.mark.parametrize("framing", [b"Content-Length: 5\r\n\r\nhello", b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"])
def test_a_response_that_is_cut_off(framing: bytes) -> None:
    data = b"HTTP/1.1 200 OK\r\n" + framing
    for cut in range(len(data)):
        reader = ResponseReader()
        reader.expect("GET")
        if cut:
            reader.feed(data[:cut])
        assert reader.begun == (cut > 0)
        with pytest.raises(MessageError) as refused:
            reader.eof()
        assert refused.value.status == 502
