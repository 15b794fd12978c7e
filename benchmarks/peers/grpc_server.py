"""A gRPC server for calls with one request and one answer, or a stream that has one answer and stays open.

As the gRPC protocol over HTTP/2 says (github.com/grpc/grpc, doc/PROTOCOL-HTTP2.md), without compression or deadlines.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import h2.config
import h2.connection
import h2.events
import h2.exceptions

_PREFIX: Final = 5
"""Of a message: whether it is compressed, and four bytes of length."""
_LONGEST: Final = 16 * 1024
"""A request's bytes; a CSR has half a kilobyte, and a token two."""


class Status(IntEnum):
    """As gRPC numbers them."""

    OK = 0
    INVALID_ARGUMENT = 3
    NOT_FOUND = 5
    PERMISSION_DENIED = 7
    UNIMPLEMENTED = 12


class RefusedError(Exception):
    """The call is answered with a status, and this text."""

    def __init__(self, status: Status, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(frozen=True, slots=True)
class Call:
    """`answer` takes a message and gives one; it raises RefusedError."""

    answer: Callable[[bytes], bytes]
    stays_open: bool = False
    """After its one answer: nothing changes."""


async def serve(calls: Mapping[str, Call], address: tuple[str, int], tls: ssl.SSLContext | None = None) -> None:
    """Answer calls, by path, at an address until cancelled. Raises OSError."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(calls), *address, ssl=tls)
    await server.serve_forever()


class _Connection(asyncio.Protocol):
    def __init__(self, calls: Mapping[str, Call]) -> None:
        self._calls = calls
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self._requests: dict[int, tuple[str, bytearray]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._http.initiate_connection()
        self._flush()

    def data_received(self, data: bytes) -> None:
        try:
            for event in self._http.receive_data(data):
                self._handle(event)
        except h2.exceptions.ProtocolError as error:
            print(f"not HTTP/2 as it should be: {error}", file=sys.stderr)
            self._flush()
            self._transport.close()
        else:
            self._flush()

    def _handle(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.RequestReceived):
            headers = {str(name): str(value) for name, value in event.headers or ()}
            self._requests[event.stream_id or 0] = (headers.get(":path", ""), bytearray())
        elif isinstance(event, h2.events.DataReceived):
            stream = event.stream_id or 0
            self._http.acknowledge_received_data(event.flow_controlled_length or 0, stream)
            _, body = self._requests.get(stream, ("", bytearray()))
            body += event.data or b""
            if len(body) > _PREFIX + _LONGEST:
                self._requests.pop(stream, None)
                self._http.reset_stream(stream)
        elif isinstance(event, h2.events.StreamReset):
            self._requests.pop(event.stream_id or 0, None)
        elif isinstance(event, h2.events.StreamEnded) and event.stream_id in self._requests:
            path, body = self._requests.pop(event.stream_id)
            self._answer(event.stream_id, path, bytes(body))

    def _answer(self, stream: int, path: str, body: bytes) -> None:
        head = [(":status", "200"), ("content-type", "application/grpc")]
        try:
            call = self._calls.get(path)
            if call is None:
                raise RefusedError(Status.UNIMPLEMENTED, f"no call is named {path}")
            message = call.answer(_unwrapped(body))
        except RefusedError as error:
            print(f"{path}: {error}", file=sys.stderr)
            # The text is percent-encoded UTF-8; ours is ASCII without a percent sign.
            trailers = [("grpc-status", str(int(error.status))), ("grpc-message", str(error))]
            self._http.send_headers(stream, [*head, *trailers], end_stream=True)
            return
        self._http.send_headers(stream, head)
        self._http.send_data(stream, b"\0" + len(message).to_bytes(4, "big") + message)
        if not call.stays_open:
            self._http.send_headers(stream, [("grpc-status", "0")], end_stream=True)

    def _flush(self) -> None:
        self._transport.write(self._http.data_to_send())


def _unwrapped(body: bytes) -> bytes:
    """The one message of a request."""
    if len(body) < _PREFIX or body[0] or len(body) != _PREFIX + int.from_bytes(body[1:_PREFIX], "big"):
        raise RefusedError(Status.INVALID_ARGUMENT, "one uncompressed message is wanted")
    return body[_PREFIX:]
