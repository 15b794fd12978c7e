"""A client by hand of a running uProxy: one mTLS connection on which any frames are written, and what comes back."""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hpack import Decoder

from benchmarks.pairs import DB_ADDRESS, Wire
from control.api.address import HBONE_PORT
from tests.support import hbone as raw
from tests.support.hbone import (
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    RST_STREAM,
    SETTINGS,
    frame,
    literal_block,
)

PATIENCE_S = 30.0


@dataclass
class Server:
    """A uProxy for db, its application's listener, and the namespaces around them."""

    wire: Wire
    pid: int
    listener: socket.socket

    def tcp(self) -> socket.socket:
        return self.wire.web.connect((DB_ADDRESS, HBONE_PORT), PATIENCE_S)

    def tls(self, identity: str = "web") -> ssl.SSLSocket:
        """mTLS, and nothing said yet."""
        return context(self.wire, identity).wrap_socket(self.tcp())

    def peer(self, identity: str = "web") -> Peer:
        return Peer(self, identity)


@dataclass
class Answer:
    """What came back on one stream."""

    status: bytes = b""
    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: bytes = b""
    ended: bool = False
    reset: int | None = None


def context(wire: Wire, identity: str | None, alpn: Sequence[str] = ("h2",)) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname = False
    made.load_verify_locations(wire.identity("web") / "bundle.pem")
    if alpn:
        made.set_alpn_protocols(alpn)
    if identity is not None:
        made.load_cert_chain(wire.identity(identity) / "chain.pem", wire.identity(identity) / "key.pem")
    return made


class Peer:
    """A client that writes the frames it is told to."""

    def __init__(self, server: Server, identity: str = "web") -> None:
        self.server = server
        self.end = server.tls(identity)
        self.decoder = Decoder()
        self.answers: dict[int, Answer] = {}
        self.pongs: list[bytes] = []
        self.acknowledged = 0
        """Our SETTINGS that were."""
        self.goaways: list[tuple[int, int, bytes]] = []
        self.closed = False
        self._received = b""
        self.send(raw.CLIENT_HELLO)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.end.close()

    def send(self, data: bytes) -> None:
        self.end.sendall(data)

    def ask(self, headers: list[tuple[bytes, bytes]], stream_id: int = 1, flags: int = END_HEADERS) -> Answer:
        """Send a request and wait for the answer's head, or the end of the stream."""
        self.answers[stream_id] = answer = Answer()
        self.send(frame(HEADERS, flags, stream_id, literal_block(headers)))
        self.until(lambda: answer.status or answer.reset is not None)
        return answer

    def until(self, done: Callable[[], object]) -> None:
        """Read frames until `done`, or the end of the connection."""
        deadline = time.monotonic() + PATIENCE_S
        while not done() and not self.closed:
            assert time.monotonic() < deadline, "no answer"
            self.read()

    def read(self) -> None:
        try:
            part = self.end.recv(1 << 16)
        except ConnectionError:
            part = b""
        if not part:
            self.closed = True
        self._received += part
        while len(self._received) >= 9:
            length = int.from_bytes(self._received[:3], "big")
            if len(self._received) < 9 + length:
                break
            kind, flags, stream_id = struct.unpack_from(">BBI", self._received, 3)
            self._frame(kind, flags, stream_id, self._received[9 : 9 + length])
            self._received = self._received[9 + length :]

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        answer = self.answers.setdefault(stream_id, Answer())
        if kind == HEADERS:
            answer.headers = {bytes(n): bytes(v) for n, v in self.decoder.decode(payload, raw=True)}
            answer.status = answer.headers[b":status"]
        elif kind == DATA:
            answer.data += payload
        elif kind == RST_STREAM:
            answer.reset = int.from_bytes(payload, "big")
        elif kind == PING and flags & 1:
            self.pongs.append(payload)
        elif kind == GOAWAY:
            self.goaways.append((*struct.unpack_from(">II", payload), payload[8:]))
        elif kind == SETTINGS and flags & 1:
            self.acknowledged += 1
        elif kind == SETTINGS:
            self.decoder.max_allowed_table_size = 4096
        if kind in (HEADERS, DATA) and flags & END_STREAM:
            answer.ended = True
