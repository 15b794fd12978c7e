"""What an HTTP/1.1 exchange becomes between its two readers and writers."""

from __future__ import annotations

import pytest

from waypoint.http1 import (
    CHUNKED,
    END,
    NO_BODY,
    UNTIL_CLOSE,
    Body,
    End,
    Ending,
    Framing,
    MessageError,
    RequestHead,
    RequestReader,
    RequestWriter,
    ResponseHead,
    ResponseReader,
    ResponseWriter,
    length,
)

DIALLED = b"10.0.0.7:9080"
HOST = (b"host", b"a")


def head_of(data: bytes) -> RequestHead:
    head = RequestReader(DIALLED).feed(data)[0]
    assert isinstance(head, RequestHead)
    return head


def response_to(method: str, data: bytes) -> tuple[list[object], ResponseReader]:
    reader = ResponseReader()
    reader.expect(method)
    return [*reader.feed(data)], reader


GET = head_of(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
HEAD = head_of(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n")
OLD_GET = head_of(b"GET / HTTP/1.0\r\n\r\n")
CLOSING_GET = head_of(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")


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

    (response, content, whole), responses = response_to(
        "POST", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;a=b\r\nllo\r\n0\r\nT: 1\r\n\r\n"
    )
    assert responses.reusable
    back = ResponseWriter(request)
    assert back.head(response) == b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    assert (content, whole) == (Body(b"hello"), End([(b"t", b"1")]))
    assert back.body(b"hello") + back.end() == b"5\r\nhello\r\n0\r\n\r\n"
    assert not back.close


# -- requests


@pytest.mark.parametrize(
    ("lines", "left"),
    [
        (b"Connection: keep-alive\r\nKeep-Alive: 5\r\nX: y", [(b"x", b"y")]),
        (b"Connection: X-A,, x-b ,\r\nConnection: x-c\r\nX-A: 1\r\nx-B: 2\r\nX-C: 3\r\nX-D: 4", [(b"x-d", b"4")]),
        (b"Connection: host\r\nX: y", [(b"x", b"y")]),
        (b"Proxy-Connection: close\r\nTE: trailers\r\nTrailer: X\r\nX: y", [(b"x", b"y")]),
        (b"Upgrade: h2c\r\nHTTP2-Settings: AAM\r\nConnection: upgrade, http2-settings\r\nX: y", [(b"x", b"y")]),
        (b"Set: \t a  b \t\r\nX:y", [(b"set", b"a  b"), (b"x", b"y")]),
    ],
)
def test_fields_of_the_connection_go_no_further(lines: bytes, left: list[tuple[bytes, bytes]]) -> None:
    head = head_of(b"GET / HTTP/1.1\r\n" + lines + b"\r\nHost: a\r\n\r\n")
    assert head.fields == [HOST, *left]
    assert head.keep_alive


def test_whether_the_client_takes_another_response() -> None:
    assert GET.keep_alive
    assert not CLOSING_GET.keep_alive
    assert not OLD_GET.keep_alive
    assert not head_of(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").keep_alive
    assert not head_of(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: x, CLOSE\r\n\r\n").keep_alive


def test_the_host_of_a_request_that_names_none_is_the_one_dialled() -> None:
    assert OLD_GET.fields == [(b"host", DIALLED)]
    assert RequestWriter().head(OLD_GET) == b"GET / HTTP/1.1\r\nhost: 10.0.0.7:9080\r\n\r\n"


@pytest.mark.parametrize(
    ("target", "path"),
    [(b"http://A:80/b?c", "/b?c"), (b"HTTP://a:80", "/"), (b"http://a:80?b", "/?b"), (b"//a:80/b", "//a:80/b")],
)
def test_a_url_as_target_becomes_a_path(target: bytes, path: str) -> None:
    head = head_of(b"GET " + target + b" HTTP/1.1\r\nHost: a:80\r\n\r\n")
    assert (head.target, head.fields) == (path, [(b"host", b"a:80")])


@pytest.mark.parametrize(
    ("version", "lines", "expects"),
    [
        (b"1.1", b"Expect: 100-Continue\r\nContent-Length: 5\r\n", True),
        (b"1.1", b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n", True),
        (b"1.1", b"Expect: 100-continue\r\n", False),
        (b"1.0", b"Expect: 100-continue\r\nContent-Length: 5\r\n", False),
    ],
)
def test_an_expectation_goes_on_where_it_means_something(version: bytes, lines: bytes, expects: bool) -> None:
    head = head_of(b"POST / HTTP/" + version + b"\r\nHost: a\r\n" + lines + b"\r\n")
    assert head.expects_continue == expects
    assert (b"\r\nexpect: 100-continue\r\n" in RequestWriter().head(head)) == expects


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "M-SEARCH"])
def test_no_body_of_a_request_is_lost(method: str) -> None:
    events = RequestReader(DIALLED).feed(
        b"%b / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello" % method.encode("ascii")
    )
    assert events[1:] == [Body(b"hello"), END]


def test_an_empty_body_is_told_from_none() -> None:
    assert head_of(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n").framing == length(0)
    assert head_of(b"POST / HTTP/1.1\r\nHost: a\r\n\r\n").framing == NO_BODY


def test_the_next_request_waits() -> None:
    reader = RequestReader(DIALLED)
    first, end = reader.feed(b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\nGET /3")
    assert isinstance(first, RequestHead)
    assert (first.target, end) == ("/1", END)
    assert reader.feed(b" HTTP/1.1\r\n") == []
    second, end = reader.proceed()
    assert isinstance(second, RequestHead)
    assert (second.target, end) == ("/2", END)
    assert reader.proceed() == []
    assert not reader.idle
    third, end = reader.feed(b"Host: a\r\n\r\n")
    assert isinstance(third, RequestHead)
    assert (third.target, end) == ("/3", END)


def test_an_empty_line_after_a_body_is_no_request() -> None:
    reader = RequestReader(DIALLED)
    reader.feed(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n1\r\n")
    assert reader.proceed() == []
    assert reader.idle
    reader.eof()


# -- responses


@pytest.mark.parametrize(
    ("method", "data", "framing", "reusable"),
    [
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", length(0), True),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n", NO_BODY, True),
        ("GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", NO_BODY, True),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", Framing(Ending.NONE, 5), True),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", Framing(Ending.NONE, 5), True),
        ("HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", NO_BODY, True),
        ("HEAD", b"HTTP/1.1 200 OK\r\n\r\n", NO_BODY, True),
        ("GET", b"HTTP/1.1 200\r\nContent-Length: 0\r\n\r\n", length(0), True),
        ("GET", b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n", length(0), True),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", length(0), False),
        ("GET", b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n", length(0), False),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 200 OK\r\n", length(0), False),
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", Framing(Ending.NONE, 5), False),
    ],
)
def test_responses_without_content(method: str, data: bytes, framing: Framing, reusable: bool) -> None:
    (head, end), reader = response_to(method, data)
    assert isinstance(head, ResponseHead)
    assert (head.framing, end, reader.reusable) == (framing, END, reusable)


def test_a_body_that_ends_with_the_connection() -> None:
    (head, body), reader = response_to("GET", b"HTTP/1.1 200 OK\r\n\r\nhel")
    assert isinstance(head, ResponseHead)
    assert (head.framing, body) == (UNTIL_CLOSE, Body(b"hel"))
    assert reader.feed(b"lo") == [Body(b"lo")]
    assert reader.eof() == [END]
    assert not reader.reusable


def test_interim_responses_come_first() -> None:
    events, reader = response_to(
        "POST",
        b"HTTP/1.1 100 Continue\r\n\r\n"
        b"HTTP/1.1 103 Early Hints\r\nConnection: close\r\n\r\n"
        b"HTTP/1.1 204 No Content\r\n\r\n",
    )
    assert [event.status for event in events if isinstance(event, ResponseHead)] == [100, 103, 204]
    assert events[3:] == [END]
    assert reader.reusable


def test_one_response_after_the_other() -> None:
    reader = ResponseReader()
    for _ in range(2):
        reader.expect("GET")
        assert not reader.begun
        assert reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")[1:] == [Body(b"hello"), END]
        assert reader.begun
    assert reader.eof() == []
    assert not reader.reusable


def test_a_response_that_nobody_asked_for() -> None:
    reader = ResponseReader()
    assert reader.feed(b"HTTP/1.1 408 Request Timeout\r\n\r\n") == []
    assert not reader.reusable


def test_a_server_that_is_gone_before_it_has_answered() -> None:
    reader = ResponseReader()
    reader.expect("GET")
    with pytest.raises(MessageError, match="closed the connection"):
        reader.eof()
    assert not reader.begun


OK = ResponseHead(200, b"OK", [], CHUNKED)


@pytest.mark.parametrize(
    ("request_head", "framing", "sent", "closes"),
    [
        (GET, CHUNKED, b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", False),
        (GET, UNTIL_CLOSE, b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", False),
        (GET, length(5), b"content-length: 5\r\n\r\nhello", False),
        (CLOSING_GET, length(5), b"connection: close\r\ncontent-length: 5\r\n\r\nhello", True),
        (OLD_GET, length(5), b"connection: close\r\ncontent-length: 5\r\n\r\nhello", True),
        (OLD_GET, CHUNKED, b"connection: close\r\n\r\nhello", True),
        (OLD_GET, UNTIL_CLOSE, b"connection: close\r\n\r\nhello", True),
        (HEAD, length(5), b"content-length: 5\r\n\r\n", False),
        (HEAD, CHUNKED, b"transfer-encoding: chunked\r\n\r\n", False),
    ],
)
def test_a_body_as_the_client_understands_it(
    request_head: RequestHead, framing: Framing, sent: bytes, closes: bool
) -> None:
    writer = ResponseWriter(request_head)
    data = writer.head(ResponseHead(200, b"OK", [], framing)) + writer.body(b"hello") + writer.body(b"") + writer.end()
    assert data == b"HTTP/1.1 200 OK\r\n" + sent
    assert writer.close == closes


def test_the_end_of_a_connection_is_announced() -> None:
    writer = ResponseWriter(GET)
    assert writer.head(OK, close=True).startswith(b"HTTP/1.1 200 OK\r\nconnection: close\r\n")
    assert writer.close


def test_interim_responses_are_kept_from_old_clients() -> None:
    interim = ResponseHead(100, b"Continue", [])
    assert ResponseWriter(GET).head(interim) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert ResponseWriter(OLD_GET).head(interim) == b""
