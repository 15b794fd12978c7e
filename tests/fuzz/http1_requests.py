"""What a waypoint reads of clients (`waypoint.http1.RequestReader`), whole and in pieces; h11 and llhttp beside it.

And what it tells by the first bytes where nobody has said that they are HTTP (`waypoint.detection`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import httptools

from tests.support.http1_judges import NEXT_REQUEST, by_h11, by_llhttp, forwarded
from tests.support.http1_vectors import REFUSED, TAKEN
from waypoint.detection import Begun, begun
from waypoint.http1 import (
    END,
    Body,
    MessageError,
    RequestEvent,
    RequestHead,
    RequestReader,
    RequestWriter,
    ResponseHead,
    ResponseWriter,
)

MAX_BYTES = 1024
WORDS = (
    b"\r\n", b"\r\n\r\n", b" HTTP/1.1\r\n", b" HTTP/1.0\r\n", b"Host: a\r\n", b"Content-Length: ", b"0\r\n\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"Upgrade: h2c\r\n",
    b"X_Forwarded_For: ", b"http://a/", b"5\r\nhello\r\n", b";a=b", b"\x00", b"\x0b", b"\xa0", b"\t", b": ",
)  # fmt: skip
_SEVERAL = 4
"""Requests of one connection that are read."""


def seeds() -> Iterable[bytes]:
    for message in (*TAKEN.values(), *REFUSED.values()):
        yield b"\x07" + message


def check(data: bytes) -> None:
    """A byte that says how long the pieces are, and what a client sends."""
    step, sent = 1 + data[0] if data else 1, data[1:]
    whole, refused = _read(sent, len(sent) or 1)
    pieces, refused_in_pieces = _read(sent, step)
    assert refused == refused_in_pieces, (refused, refused_in_pieces)
    assert refused or whole == pieces, f"\n{whole}\n{pieces}"
    if sent:
        told = begun(sent)
        assert begun(sent[:step]) in (None, told)
        assert told is Begun.HTTP1 or not whole, "a request that would pass as none"
    for event in whole:
        if isinstance(event, RequestHead):
            _same_when_written_again(event)
    if (found := forwarded(sent)) is not None:
        written, request = found
        assert by_h11(written) == [request, NEXT_REQUEST]
        with contextlib.suppress(httptools.HttpParserInvalidMethodError):  # it knows a list of methods only
            assert by_llhttp(written) == [request, NEXT_REQUEST]


def _read(data: bytes, step: int) -> tuple[list[RequestEvent], int]:
    """Events, those of bodies joined, and the status of a refusal or 0."""
    reader = RequestReader(b"dialled:1")
    events: list[RequestEvent] = []
    try:
        for start in range(0, len(data), step):
            new = reader.feed(data[start : start + step])
            while new:
                for event in new:
                    if isinstance(event, Body):
                        assert event.data
                        if isinstance(events[-1], Body):
                            event = Body(events.pop().data + event.data)
                    events.append(event)
                new = reader.proceed() if new[-1] is END and events.count(END) < _SEVERAL else []
        reader.eof()
    except MessageError as error:
        return events, error.status
    return events, 0


def _same_when_written_again(head: RequestHead) -> None:
    written = RequestWriter().head(head)
    again = RequestReader(b"dialled:2").feed(written)[0]
    assert isinstance(again, RequestHead)
    assert (again.method, again.target, again.framing) == (head.method, head.target, head.framing)
    assert sorted(again.fields) == sorted(head.fields)
    # Whoever sent it can be answered.
    assert ResponseWriter(head).head(ResponseHead(400, b"Bad Request", [])).startswith(b"HTTP/1.1 400 ")
