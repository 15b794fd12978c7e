"""What a waypoint reads of servers (`waypoint.http1.ResponseReader`): whole and in pieces; h11 beside it."""

from __future__ import annotations

from collections.abc import Iterable

from tests.support.http1_judges import NEXT_RESPONSE, read_by_h11, relayed
from waypoint.http1 import END, Body, MessageError, ResponseEvent, ResponseReader

MAX_BYTES = 1024
WORDS = (
    b"\r\n", b"\r\n\r\n", b"HTTP/1.1 ", b"HTTP/1.0 ", b"100 Continue", b"101 ", b"103 Early Hints", b"204 ", b"304 ",
    b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n",
    b";a=b", b"\x00", b"\xa0", b"\t",
)  # fmt: skip
_METHODS = ("GET", "HEAD", "POST")


def seeds() -> Iterable[bytes]:
    for number, message in enumerate(
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            b"HTTP/1.1 404\r\nX: y\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX: y\r\n\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
            b"HTTP/1.1 304 Not Modified\r\nConnection: x\r\nX: y\r\nContent-Length: 5\r\n\r\n",
            b"HTTP/1.0 200 \xe9\r\n\r\nhello",
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n",
        )
    ):
        for method in range(len(_METHODS)):
            yield bytes((method, number)) + message


def check(data: bytes) -> None:
    """A byte that says what was asked, one that says how long the pieces are, and what the server sends."""
    how, sent = data[:2].ljust(2, b"\0"), data[2:]
    method, step = _METHODS[how[0] % len(_METHODS)], 1 + how[1]
    whole, refused, reusable = _read(sent, len(sent) or 1, method)
    pieces, refused_in_pieces, reusable_in_pieces = _read(sent, step, method)
    assert (refused, reusable) == (refused_in_pieces, reusable_in_pieces)
    assert refused or whole == pieces, f"\n{whole}\n{pieces}"
    if (found := relayed(sent, method)) is not None:
        written, seen = found
        assert read_by_h11(written, method) == [*seen, (200, b"next")]


def _read(data: bytes, step: int, method: str) -> tuple[list[ResponseEvent], int, bool]:
    """Events, those of bodies joined; the status of a refusal or 0; and whether the connection could be used again."""
    reader = ResponseReader()
    reader.expect(method)
    events: list[ResponseEvent] = []
    try:
        for start in range(0, len(data), step):
            for event in reader.feed(data[start : start + step]):
                if isinstance(event, Body):
                    assert event.data
                    if isinstance(events[-1], Body):
                        event = Body(events.pop().data + event.data)
                events.append(event)
        reusable = reader.reusable
        if not reusable:
            events += reader.eof()
    except MessageError as error:
        assert not reader.reusable
        return events, error.status, False
    if reusable:
        reader.expect("GET")
        assert reader.feed(NEXT_RESPONSE)[1:] == [Body(b"next"), END]
    assert reader.eof() == []
    assert not reader.reusable
    return events, 0, reusable
