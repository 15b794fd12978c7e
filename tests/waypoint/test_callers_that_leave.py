"""Callers that reset their stream: nothing is begun for them any more, and nothing is held."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from benchmarks.lab.connect import tls_context
from control.api.address import HBONE_PORT
from control.server.ca import Authority
from tests.support.hbone import (
    ACK,
    CLIENT_HELLO,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    RST_STREAM,
    frame,
    frames_of,
    literal_block,
    u32,
)
from tests.support.pair import SERVICE_PORT, VIP, WEB_ADDRESS
from tests.support.through_waypoint import WP_ADDRESS, Through, run_through, settled
from tests.support.waiting import until
from uproxy.hbone import ErrorCode

Reader, Writer = asyncio.StreamReader, asyncio.StreamWriter

CONNECT = [(b":method", b"CONNECT"), (b":authority", f"{VIP}:{SERVICE_PORT}".encode())]
OPENED = CLIENT_HELLO + frame(HEADERS, END_HEADERS, 1, literal_block(CONNECT))
GET = b"GET /held HTTP/1.1\r\nHost: db\r\n\r\n"
POSTS = b"".join(b"POST /%d HTTP/1.1\r\nHost: db\r\nContent-Length: 2\r\n\r\nhi" % number for number in range(10))
BY_HTTP2 = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"db"), (b":path", b"/held")]


def reset(code: ErrorCode) -> bytes:
    return frame(RST_STREAM, 0, 1, u32(code))


class Caller:
    """web, by hand: one connection to the waypoint on which any frames are written."""

    def __init__(self, reader: Reader, writer: Writer) -> None:
        self._reader, self._writer = reader, writer
        self._pings = 0

    async def say(self, frames: bytes) -> list[tuple[int, int, int, bytes]]:
        """Write them at once. All frames that come until they were read, and what they began in that turn was done."""
        self._pings += 1
        payload = self._pings.to_bytes(8, "big")
        self._writer.write(frames + frame(PING, 0, 0, payload))
        return frames_of(await self._reader.readuntil(frame(PING, ACK, 0, payload)))


@contextlib.asynccontextmanager
async def by_hand(identities: Path) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_connection(
        WP_ADDRESS,
        HBONE_PORT,
        ssl=tls_context(identities / "web"),
        server_hostname="",
        local_addr=(WEB_ADDRESS, 0),
        limit=1 << 20,
    )
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class Backend:
    """An HTTP server that answers everything at once, but for requests to /held, which it never answers."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []

    async def serve(self, reader: Reader, writer: Writer) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head.partition(b"\r\n")[0])
                if b" /held " not in head:
                    await reader.readexactly(2)
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()


LEAVES = {
    "cancel": reset(ErrorCode.CANCEL),
    "end, and reads no more": frame(DATA, END_STREAM, 1) + reset(ErrorCode.NO_ERROR),
}


@pytest.mark.parametrize("leaves", LEAVES)
def test_what_was_pipelined_is_not_sent_on_when_its_caller_has_left(
    identities: Path, authority: Authority, leaves: str
) -> None:
    backend = Backend()

    async def client(through: Through) -> None:
        async with by_hand(identities) as caller:
            await caller.say(OPENED + frame(DATA, 0, 1, GET + POSTS))
            await until(lambda: backend.heads)
            await caller.say(LEAVES[leaves])
            await until(lambda: through.telemetry.exchanges)
            through.pair.plane.run(through.upstream.close)
            await settled(through)
        assert backend.heads == [b"GET /held HTTP/1.1"]
        assert [(one.flag, one.status) for one in through.telemetry.exchanges] == [("DC", 0)]

    run_through(identities, authority, backend.serve, client)


SAID = {
    "HTTP/1.1": GET + POSTS,
    "HTTP/2": CLIENT_HELLO + frame(HEADERS, END_HEADERS | END_STREAM, 1, literal_block(BY_HTTP2)),
}


@pytest.mark.parametrize("said", SAID)
def test_a_caller_that_has_left_before_its_stream_was_taken_asks_for_nothing(
    identities: Path, authority: Authority, said: str
) -> None:
    backend = Backend()

    async def client(through: Through) -> None:
        async with by_hand(identities) as caller:
            whole = OPENED + frame(DATA, END_STREAM, 1, SAID[said]) + reset(ErrorCode.NO_ERROR)
            came = await caller.say(whole)
            await settled(through)
            came += await caller.say(b"")
        assert not [one for one in came if one[2] == 1], "the stream is gone"
        assert not backend.heads

    run_through(identities, authority, backend.serve, client)


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "endless"])
def test_what_a_caller_of_opaque_tcp_has_said_before_it_left_arrives_and_holds_nothing(
    identities: Path, authority: Authority, silent: bool
) -> None:
    arrived: list[bytes] = []
    over = asyncio.Event()

    async def server(reader: Reader, writer: Writer) -> None:
        """Reads all; then ends, or sends for as long as anybody takes it."""
        arrived.append(await reader.read())
        with contextlib.suppress(ConnectionError):
            while not silent:
                writer.write(bytes(10_000))
                await writer.drain()
        writer.close()
        over.set()

    async def client(through: Through) -> None:
        async with by_hand(identities) as caller:
            came = await caller.say(OPENED + frame(DATA, END_STREAM, 1, b"all") + reset(ErrorCode.NO_ERROR))
            await until(over.is_set)
            await until(lambda: through.telemetry.ended)
            await settled(through)
            came += await caller.say(b"")
        assert arrived == [b"all"]
        assert not [one for one in came if one[2] == 1], "the stream is gone"
        assert not through.telemetry.ended[0].error

    run_through(identities, authority, server, client, protocol="tcp")
