"""What an HTTP/1.1 exchange becomes between its two readers and writers."""

from __future__ import annotations

from waypoint.http1 import END, Body, RequestHead, RequestReader, RequestWriter, ResponseReader, ResponseWriter

DIALLED = b"10.0.0.7:9080"


def test_an_exchange() -> None:
    reader = RequestReader(DIALLED)
    request, body, end = reader.feed(
        b"POST /reviews?x=1 HTTP/1.1\r\nHost: reviews\r\nContent-Length: 5\r\nConnection: x-a\r\nX-A: 1\r\n\r\nhello"
    )
    assert isinstance(request, RequestHead)
    assert (request.method, request.target, request.fields) == ("POST", "/reviews?x=1", [(b"host", b"reviews")])
    assert (body, end) == (Body(b"hello"), END)

    onward = RequestWriter()
    sent = onward.head(request) + onward.body(b"hello") + onward.end()
    assert sent == b"POST /reviews?x=1 HTTP/1.1\r\nhost: reviews\r\ncontent-length: 5\r\n\r\nhello"

    responses = ResponseReader()
    responses.expect(request.method)
    events = responses.feed(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;a=b\r\nllo\r\n0\r\nT: 1\r\n\r\n"
    )
    assert responses.reusable
    back = ResponseWriter(request)
    assert back.head(events[0]) == b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    assert back.body(events[1].data) + back.end() == b"5\r\nhello\r\n0\r\n\r\n"
    assert not back.close
