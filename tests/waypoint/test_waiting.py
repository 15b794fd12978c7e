"""How long what callers send waits for its turn: in their tunnels, and in their connections of HTTP/2."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from control.server.ca import Authority
from tests.support.certificates import WEB
from tests.support.http2_peer import speaking
from tests.support.through_waypoint import Through, run_through
from tests.support.waiting import until
from tests.waypoint.test_overload import GET, hello
from uproxy.plane import Plane
from waypoint import gateway
from waypoint.http2_connection import Http2Connection

HEAD = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"db"), (b":path", b"/")]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """How long each request had waited: in its tunnel and, if it is of HTTP/2, in its connection."""
    told: list[float | None] = []

    def sheds(self: object, *ways: tuple[object, float | None]) -> bool:
        told.extend(waited_s for _, waited_s in ways)
        return False

    monkeypatch.setattr(gateway.Shedding, "sheds", sheds)
    return told


async def ask(through: Through, count: int) -> None:
    """So many requests of HTTP/1.1 at once."""
    callers = [await through.open() for _ in range(count)]
    for _, writer in callers:
        writer.write(GET)
    for reader, writer in callers:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()


def test_what_is_read_at_once_has_not_waited(identities: Path, authority: Authority, waits: list[float]) -> None:
    async def client(through: Through) -> None:
        for _ in range(3):
            await ask(through, 1)

    run_through(identities, authority, hello, client)
    assert waits == [0.0] * 3


def test_a_tunnel_waits_while_the_process_is_busy(
    identities: Path, authority: Authority, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        (tunnel,) = (one for one in through.server.tunnels() if one.peer == WEB)
        with monkeypatch.context() as busy:
            busy.setattr(Plane, "busy", True)
            busy.setattr(Plane, "_take_queued", lambda self: None)
            began = time.monotonic()
            writer.write(GET)
            await until(lambda: tunnel._waits)
            await asyncio.sleep(0.1)
        await reader.readuntil(b"\r\n\r\n")
        took = time.monotonic() - began
        assert 0.1 <= waits[-1] <= took
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        assert waits[-1] == 0.0, "and then it does not"
        writer.close()

    run_through(identities, authority, hello, client)


def test_a_request_that_waits_for_the_answer_before_tells_nothing_of_its_tunnel(
    identities: Path, authority: Authority, waits: list[float | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        (tunnel,) = (one for one in through.server.tunnels() if one.peer == WEB)
        waits.clear()
        with monkeypatch.context() as busy:
            busy.setattr(Plane, "busy", True)
            busy.setattr(Plane, "_take_queued", lambda self: None)
            writer.write(GET * 3 + GET[:20])
            await until(lambda: tunnel._waits)
            await asyncio.sleep(0.05)
        for _ in range(3):
            await reader.readuntil(b"\r\n\r\n")
        first, *others = waits
        assert first is not None
        assert first >= 0.05
        assert others == [None, None], "it is their connection's own queue"
        writer.write(GET[20:] + GET)
        await reader.readuntil(b"\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(GET)
        await reader.readuntil(b"\r\n\r\n")
        assert waits[-1] == 0.0
        writer.close()

    run_through(identities, authority, hello, client)


def test_requests_beyond_a_turns_part_wait_in_their_connection(
    identities: Path, authority: Authority, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[float] = []
    keep = Http2Connection._keep

    def noted(self: Http2Connection, unread: bytes, taken: int) -> None:
        keep(self, unread, taken)
        kept.append(self.waited_s)

    monkeypatch.setattr(Http2Connection, "_keep", noted)

    async def client(through: Through) -> None:
        async with speaking(*await through.open()) as peer:
            await peer.answer(peer.request(HEAD))
            waits.clear()
            for stream in [peer.request(HEAD) for _ in range(64)]:
                await peer.answer(stream)

    run_through(identities, authority, hello, client)
    in_connection = waits[1::2]
    assert len(in_connection) == 64
    assert in_connection[0] == 0.0, "the first ones were read at once"
    late = [waited_s for waited_s in in_connection if waited_s]
    assert len(late) >= 32
    assert late[0] < late[len(late) // 2], "the later, the longer"
    assert kept[-1] == 0.0


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut"])
def test_only_a_whole_head_waits_for_the_answer_before(
    identities: Path, authority: Authority, waits: list[float | None], whole: bool
) -> None:
    answer = asyncio.Event()

    async def late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            await answer.wait()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async def client(through: Through) -> None:
        reader, writer = await through.open()
        writer.write(GET)
        await until(lambda: waits)
        (tunnel,) = (one for one in through.server.tunnels() if one.peer == WEB)
        (stream,) = tunnel.connection.streams.values()
        here = len(GET) if whole else 20
        writer.write(GET[:here])
        await until(lambda: not stream.owner.quiet)
        answer.set()
        await reader.readuntil(b"\r\n\r\n")
        writer.write(GET[here:])
        await reader.readuntil(b"\r\n\r\n")
        writer.close()
        assert len(waits) == 2
        assert (waits[1] is None) == whole

    run_through(identities, authority, late, client)
