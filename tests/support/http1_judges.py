"""Other parsers of HTTP/1.1, to judge what a waypoint forwards: h11 and llhttp, which is Node's.

Behind each message follows another: whoever sees an end that we do not would not read both.
"""

from __future__ import annotations

from typing import Any

import h11
import httptools

from waypoint.http1 import (
    Body,
    MessageError,
    RequestHead,
    RequestReader,
    RequestWriter,
    ResponseHead,
    ResponseReader,
    ResponseWriter,
)

NEXT = b"GET /next HTTP/1.1\r\nhost: next\r\nconnection: close\r\n\r\n"
NEXT_RESPONSE = b"HTTP/1.1 200 next\r\ncontent-length: 4\r\n\r\nnext"

Request = dict[str, Any]
"""method, target, host, body, and `fields` that judges leave alone: those of our vectors, by name."""
LEFT_ALONE = ("x", "x-a", "x-b", "y", "user_id", "!#$%&'*+-.^`|~09az")


def forwarded(data: bytes) -> tuple[bytes, Request] | None:
    """What goes on of the first request, and what we take it for. None when it is refused, not whole or the last."""
    reader = RequestReader(b"dialled:1")
    try:
        events = reader.feed(data)
    except MessageError:
        return None
    if not events or not isinstance(events[0], RequestHead) or len(events) == 1 + isinstance(events[-1], Body):
        return None
    head = events[0]
    if head.upgrades:
        return None  # what a judge reads behind it is no request
    body = b"".join(event.data for event in events if isinstance(event, Body))
    writer = RequestWriter()
    sent = writer.head(head) + writer.body(body) + writer.end()
    return sent, as_request(head.method, head.target, head.fields, body)


def as_request(method: str, target: str, fields: Any, body: bytes) -> Request:
    """What of a request is compared."""
    by_name: dict[str, str] = {}
    host = ""
    for raw, value in fields:
        name = raw.decode("latin-1").lower()
        if name == "host":
            host = value.decode("latin-1")
        elif name in LEFT_ALONE:
            by_name[name] = ",".join(filter(None, (by_name.get(name), value.decode("latin-1"))))
    return {"method": method, "target": target, "host": host, "fields": by_name, "body": body.decode("latin-1")}


def by_h11(data: bytes) -> list[Request]:
    server = h11.Connection(h11.SERVER)
    server.receive_data(data + NEXT)
    seen = []
    while True:
        head, body = server.next_event(), b""
        assert isinstance(head, h11.Request)
        while isinstance(part := server.next_event(), h11.Data):
            body += part.data
        assert isinstance(part, h11.EndOfMessage)
        seen.append(as_request(head.method.decode(), head.target.decode(), head.headers, body))
        if server.their_state is h11.MUST_CLOSE:
            return seen
        server.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
        server.send(h11.EndOfMessage())
        server.start_next_cycle()


class _Callbacks:
    def __init__(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.seen: list[Request] = []

    def on_message_begin(self) -> None:
        self.target, self.fields, self.content = b"", [], b""

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))

    def on_body(self, body: bytes) -> None:
        self.content += body

    def on_message_complete(self) -> None:
        method = self.parser.get_method().decode()
        self.seen.append(as_request(method, self.target.decode(), self.fields, self.content))


def by_llhttp(data: bytes) -> list[Request]:
    callbacks = _Callbacks()
    callbacks.parser.feed_data(data + NEXT)
    return callbacks.seen


Response = tuple[int, bytes]
"""Status and body."""


def relayed(data: bytes, method: str) -> tuple[bytes, list[Response]] | None:
    """What a client gets of a response, and what we take it for. None when it is refused or not whole."""
    reader = ResponseReader()
    reader.expect(method)
    try:
        events = [*reader.feed(data), *reader.eof()]
    except MessageError:
        return None
    writer = ResponseWriter(RequestHead(method, "/", [(b"host", b"a")]))
    sent, seen = b"", []
    for event in events:
        if isinstance(event, ResponseHead):
            sent += writer.head(event)
            seen.append((event.status, b""))
        elif isinstance(event, Body):
            sent += writer.body(event.data)
            seen.append((seen.pop()[0], event.data))
    return sent + writer.end(), seen


def read_by_h11(data: bytes, method: str) -> list[Response]:
    client = h11.Connection(h11.CLIENT)
    client.receive_data(data + NEXT_RESPONSE)
    seen: list[Response] = []
    for asked in (method, "GET"):
        client.send(h11.Request(method=asked, target="/", headers=[("host", "a")]))
        client.send(h11.EndOfMessage())
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                status, body = seen.pop()
                seen.append((status, body + event.data))
            else:
                assert isinstance(event, h11.Response | h11.InformationalResponse)
                seen.append((event.status_code, b""))
        client.start_next_cycle()
    return seen


NEXT_REQUEST = as_request("GET", "/next", [(b"host", b"next")], b"")
