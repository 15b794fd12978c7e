"""Requests at a fixed rate, whatever becomes of those before them, over HTTP/1.1, HTTP/2 or as gRPC calls."""

from __future__ import annotations

import asyncio
import random
import struct
import time
from collections import Counter, deque
from typing import Final, Literal

Kind = Literal["http1", "http2", "grpc"]

_PATIENCE_S: Final = 30.0
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_WINDOW: Final = b"\0\0\x04\x08\0\0\0\0\0" + struct.pack(">L", 1 << 30)
_NO_TABLE: Final = b"\x20"  # HPACK's, before a connection's first block
_SETTINGS, _PING, _HEADERS, _DATA = 4, 6, 1, 0


def _literal(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


_HEAD: Final = b"\x82\x86\x84" + _literal(b":authority", b"db.shop")
_CALL: Final = b"\x83" + _HEAD[1:] + _literal(b"content-type", b"application/grpc") + _literal(b"te", b"trailers")


class OpenRequests:
    """One run. Waiting for a free connection or stream counts as waiting for the answer."""

    def __init__(self, kind: Kind, target: tuple[str, int], connections: int) -> None:
        self.kind = kind
        self.took_s: list[float] = []
        """Of requests that were answered by the application, from when they were due; without the first third."""
        self.refused = 0
        self.others: Counter[bytes] = Counter()
        self._target = target
        self._count = connections
        self._connections: list[_Http1 | _Http2] = []
        self._due: deque[float] = deque()
        self._counts_from = self._ends_at = 0.0
        self._answered = 0  # in between

    async def run(self, rate: float, seconds: float) -> float:
        """Requests that the application answered in a second, after the first third."""
        loop = asyncio.get_running_loop()
        for _ in range(self._count):
            made: type[_Http1 | _Http2] = _Http1 if self.kind == "http1" else _Http2
            _, connection = await loop.create_connection(lambda made=made: made(self), *self._target)  # type: ignore[misc]
            self._connections.append(connection)
        await asyncio.sleep(0.3)
        chance = random.Random(1)
        due = time.monotonic()
        self._counts_from, self._ends_at = due + seconds / 3, due + seconds
        while due < self._ends_at:
            while due <= time.monotonic():
                self._due.append(due)
                due += chance.expovariate(rate)
            self.pump()
            await asyncio.sleep(max(0.001, due - time.monotonic()))
        patience = time.monotonic() + _PATIENCE_S
        while (self._due or any(one.busy for one in self._connections)) and time.monotonic() < patience:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        for one in self._connections:
            one.close()
        return self._answered / (seconds * 2 / 3)

    def pump(self) -> None:
        while self._due:
            free = min(self._connections, key=lambda one: one.busy)
            if free.busy >= free.most:
                return
            free.ask(self._due.popleft())

    def answered(self, due: float, *, served: bool, refused: bool, answer: bytes) -> None:
        now = time.monotonic()
        if refused:
            self.refused += 1
        elif not served:
            self.others[answer] += 1
        else:
            self._answered += self._counts_from <= now < self._ends_at
            if due >= self._counts_from:
                self.took_s.append(now - due)
        self.pump()


class _Http1(asyncio.Protocol):
    most = 1

    def __init__(self, load: OpenRequests) -> None:
        self._load = load
        self._received = b""
        self._due: float | None = None

    @property
    def busy(self) -> int:
        return self._due is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self, due: float) -> None:
        self._due = due
        self._transport.write(b"GET / HTTP/1.1\r\nhost: db.shop\r\n\r\n")

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        length = int((head.partition(b"content-length: ")[2].split(b"\r")[0]) or b"0")
        if found and len(body) >= length and self._due is not None:
            due, self._due, self._received = self._due, None, b""
            refused = b"x-uproxy-reason: overload" in head
            self._load.answered(due, served=head[9:12] == b"200", refused=refused, answer=head)

    def close(self) -> None:
        self._transport.abort()


class _Http2(asyncio.Protocol):
    most = 256

    def __init__(self, load: OpenRequests) -> None:
        self._load = load
        self._received = bytearray()
        self._due: dict[int, float] = {}
        self._next = 1

    @property
    def busy(self) -> int:
        return len(self._due)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(_PREFACE + b"\0\0\0\4\0\0\0\0\0" + _WINDOW)

    def ask(self, due: float) -> None:
        block = _CALL if self._load.kind == "grpc" else _HEAD
        self._due[self._next] = due
        self._transport.write(struct.pack(">LBL", len(block) << 8 | _HEADERS, 5, self._next) + block)
        self._next += 2

    def data_received(self, data: bytes) -> None:
        self._received += data
        while len(self._received) >= 9:
            first, flags, stream = struct.unpack_from(">LBL", self._received)
            if len(self._received) < 9 + (first >> 8):
                return
            payload = bytes(self._received[9 : 9 + (first >> 8)])
            del self._received[: 9 + len(payload)]
            self._take(first & 0xFF, flags, stream, payload)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind in (_SETTINGS, _PING) and not flags & 1:
            answer = b"" if kind == _SETTINGS else payload
            self._transport.write(struct.pack(">LBL", len(answer) << 8 | kind, 1, 0) + answer)
        elif stream in self._due:
            refused = kind == _HEADERS and b"overload" in payload
            served = kind in (_HEADERS, _DATA) and bool(flags & 1)
            broken = kind == _HEADERS and not (refused or payload.removeprefix(_NO_TABLE)[:1] == b"\x88")
            if refused or served or broken:
                due = self._due.pop(stream)
                self._load.answered(due, served=not broken, refused=refused, answer=payload)

    def close(self) -> None:
        self._transport.abort()
