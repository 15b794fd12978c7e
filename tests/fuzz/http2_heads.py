"""Heads that come by HTTP/2 and go on by either (`waypoint.http2_heads`): one message, the same to all who read it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import httptools

from tests.support.http1_judges import NEXT_REQUEST, as_request, by_h11, by_llhttp, read_by_h11
from uproxy.header_block import Headers, well_formed
from waypoint.http1 import RequestReader, RequestWriter, ResponseWriter
from waypoint.http2_heads import read_request, read_response, written_request, written_response
from waypoint.messages import Ending, Framing, MessageError, RequestHead

MAX_BYTES = 1024
WORDS = (
    b":method=", b":path=", b":scheme=http", b":authority=", b":status=", b":protocol=websocket", b"host=",
    b"content-length=", b"transfer-encoding=chunked", b"te=trailers", b"cookie=", b"expect=100-continue",
    b"connection=", b"upgrade=", b"trailer=", b"keep-alive=", b"x_forwarded_for=", b"GET", b"CONNECT", b"HEAD", b"\r",
    b"\x00", b" ", b"\t", b"/..", b"#", b"5, 5", b"+5", b"0x5", b"204", b"304", b"100", b"[::1]:80", b"a@b",
)  # fmt: skip
_ENDED, _RESPONSE, _TO_HEAD = 1, 2, 4
_LONGEST_BODY = 1 << 12
_MOST_FIELDS = 95
"""To which may be added what is not there: of a message with more it is known only when it is written."""


def seeds() -> Iterable[bytes]:
    request = b":method=%b\n:scheme=http\n:authority=a.b:80\n:path=/x?y=z"
    more = b"\nx=y\ncookie=a=b\ncookie=c=d\nte=trailers\nexpect=100-continue"
    for method, fields in (
        (b"GET", b""),
        (b"POST", b"\ncontent-length=5"),
        (b"PUT", more),
        (b"GET", b"\nhost=a.b:80"),
        (b"DELETE", b"\ntransfer-encoding=chunked"),
        (b"HEAD", b"\ncontent-length=0\ncontent-length=0"),
        (b"GET", b"\ncookie=a=b\ncookie="),
    ):
        for ended in (b"\x00", b"\x01"):
            yield ended + request % method + fields
    yield b"\x00:protocol=websocket\n" + request % b"CONNECT" + b"\nsec-websocket-version=13"
    for status in (b"200", b"204", b"304", b"404", b"103"):
        for how in (b"\x02", b"\x03", b"\x06", b"\x07"):
            yield how + b":status=%b\ncontent-length=5\nx=y" % status
        yield b"\x02:status=%b\nset-cookie=a=b\nset-cookie=c=d" % status


def check(data: bytes) -> None:
    """A byte that says how, and a field in each line, `=` behind its name."""
    how = data[0] if data else 0
    headers = [(name, value) for name, _, value in (line.partition(b"=") for line in data[1:].split(b"\n"))]
    if len(headers) > _MOST_FIELDS or not well_formed(headers, request=not how & _RESPONSE):
        return
    with contextlib.suppress(MessageError):
        if how & _RESPONSE:
            _check_response(headers, "HEAD" if how & _TO_HEAD else "GET", ended=bool(how & _ENDED))
        else:
            _check_request(headers, ended=bool(how & _ENDED))


def _check_request(headers: Headers, *, ended: bool) -> None:
    head = read_request(headers, ended=ended)
    if not ended:
        _same(head, read_request(written_request(head), ended=False))
    elif not head.framing.length:
        _same(head, read_request(written_request(head), ended=True))
    if head.upgrades or (body := _body(head.framing)) is None:
        return
    writer = RequestWriter()
    sent = writer.head(head) + writer.body(body) + writer.end()
    (mine, *_) = RequestReader(b"dialled:1").feed(sent)
    assert isinstance(mine, RequestHead)
    _same(head, mine)
    expected = as_request(head.method, head.target, head.fields, body)
    assert by_h11(sent) == [expected, NEXT_REQUEST]
    with contextlib.suppress(httptools.HttpParserInvalidMethodError):  # it knows a list of methods only
        assert by_llhttp(sent) == [expected, NEXT_REQUEST]


def _check_response(headers: Headers, method: str, *, ended: bool) -> None:
    head = read_response(headers, method, ended=ended)
    again = read_response(written_response(head), method, ended=ended)
    assert (again.status, sorted(again.fields), again.framing) == (head.status, sorted(head.fields), head.framing)
    if head.interim or (body := _body(head.framing)) is None:
        return
    writer = ResponseWriter(RequestHead(method, "/", [(b"host", b"a")]))
    sent = writer.head(head) + (writer.body(body) if body else b"") + writer.end()
    assert read_by_h11(sent, method) == [(head.status, body), (200, b"next")]


def _same(one: RequestHead, other: RequestHead) -> None:
    assert (one.method, one.target, one.framing) == (other.method, other.target, other.framing)
    assert one.upgrades == other.upgrades
    assert sorted(one.fields) == sorted(other.fields)


def _body(framing: Framing) -> bytes | None:
    """One of the length that is said; None: that is too long."""
    if framing.ending is Ending.NONE:
        return b""
    length = 5 if framing.length is None else framing.length
    return bytes(length) if length <= _LONGEST_BODY else None
