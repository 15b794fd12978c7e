"""`waypoint.line`: a socket as a stream, against the other end of a real connection."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Awaitable, Callable

import pytest

from uproxy import plane
from uproxy.plane import Plane
from waypoint import line
from waypoint.byte_stream import ByteStream
from waypoint.line import OUTPUT, UNREAD, Line

PATIENCE_S = 40.0
DATA = random.Random(7).randbytes(3 << 20)

Scenario = Callable[[ByteStream, socket.socket, asyncio.AbstractEventLoop], Awaitable[None]]


def run(serve: Callable[[ByteStream], Awaitable[None]], peer: Scenario) -> None:
    """`serve` runs on the data plane, `peer` beside it."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        data_plane = Plane(loop)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        for sock in (ours, theirs):  # the kernel keeps little
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32768)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
        ours.setblocking(False)
        theirs.setblocking(False)
        served = asyncio.Event()

        async def serving(stream: ByteStream) -> None:
            try:
                await serve(stream)
            finally:
                served.set()

        try:
            stream = Line(data_plane, ours).open()
            data_plane.spawn(serving(stream))
            async with asyncio.timeout(PATIENCE_S):
                await peer(stream, theirs, loop)
                await served.wait()
                await eventually(lambda: ours.fileno() < 0)
        finally:
            theirs.close()
            data_plane.close()

    plane.run(main())


async def eventually(holds: Callable[[], object]) -> None:
    for _ in range(int(PATIENCE_S * 100)):
        if holds():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not come about")


async def received(sock: socket.socket, loop: asyncio.AbstractEventLoop) -> bytes:
    """All until the end."""
    found = bytearray()
    while data := await loop.sock_recv(sock, 65536):
        found += data
    return bytes(found)


def test_bytes_and_ends_cross_both_ways_at_once() -> None:
    async def echo(stream: ByteStream) -> None:
        while data := await stream.receive(None):
            await stream.send(data, None)
        stream.close()

    async def peer(_: ByteStream, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        async def send() -> None:
            await loop.sock_sendall(sock, DATA)
            sock.shutdown(socket.SHUT_WR)

        _, found = await asyncio.gather(send(), received(sock, loop))
        assert found == DATA

    run(echo, peer)


def test_a_peer_that_does_not_read_stops_who_sends_and_nothing_is_lost() -> None:
    sent: list[int] = []

    async def flood(stream: ByteStream) -> None:
        for at in range(0, len(DATA), 16384):
            await stream.send(DATA[at : at + 16384], None)
            sent.append(at)
        stream.close()

    async def peer(stream: ByteStream, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        await eventually(lambda: not stream.window)
        assert len(sent) * 16384 < len(DATA), "it waits"
        sock.shutdown(socket.SHUT_WR)
        assert await received(sock, loop) == DATA

    run(flood, peer)


def test_what_is_not_asked_for_stays_in_the_kernel() -> None:
    async def look(stream: ByteStream) -> None:
        await stream.wait(None)  # and does not receive

    async def peer(stream: ByteStream, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        sending = loop.create_task(loop.sock_sendall(sock, DATA))
        await asyncio.sleep(0.1)
        assert not sending.done(), "nobody reads"
        assert len(stream._received) <= UNREAD + OUTPUT, "one read may go beyond"
        sending.cancel()
        stream.carrier.plane.run(lambda: stream.abort("enough"))

    run(look, peer)


@pytest.mark.parametrize("code", ["abort", "close"])
def test_a_reset_is_no_end_and_an_end_is_no_reset(code: str) -> None:
    async def leave(stream: ByteStream) -> None:
        await stream.receive(None)
        await stream.send(b"something", None)
        getattr(stream, code)(*(["given up"] if code == "abort" else []))

    async def peer(_: ByteStream, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        await loop.sock_sendall(sock, b"hello")
        if code == "abort":
            with pytest.raises(ConnectionResetError):
                await received(sock, loop)
        else:
            assert await received(sock, loop) == b"something"
            sock.close()

    run(leave, peer)


def test_a_peers_reset_is_told_to_who_waits() -> None:
    found: list[str] = []

    async def wait(stream: ByteStream) -> None:
        stream.on_gone = lambda: found.append("gone")
        try:
            while await stream.receive(None):
                pass
        except ConnectionResetError as error:
            found.append(str(error))

    async def peer(_: ByteStream, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        await loop.sock_sendall(sock, b"some")
        await asyncio.sleep(0.05)
        plane.reset(sock)

    run(wait, peer)
    assert len(found) == 2
    assert "the connection broke" in "".join(found)


def test_a_peer_that_says_more_after_all_was_said_does_not_lose_the_answer() -> None:
    async def answer(stream: ByteStream) -> None:
        await stream.receive(None)
        await stream.send(b"the answer", None)
        stream.close()

    async def peer(_: ByteStream, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        await loop.sock_sendall(sock, b"asked")
        await asyncio.sleep(0.02)
        await loop.sock_sendall(sock, DATA[:200_000])
        assert await received(sock, loop) == b"the answer"
        sock.close()

    run(answer, peer)


def test_what_a_peer_said_before_its_end_is_not_lost_when_both_sides_have_ended() -> None:
    said, found = DATA[:600_000], bytearray()
    go_on: list[plane.Waiter[None]] = []

    async def read_late(stream: ByteStream) -> None:
        stream.end()
        await stream.wait(None)
        go_on.append(plane.Waiter(stream.carrier.plane))
        await go_on[0]
        while data := await stream.receive(None):
            found.extend(data)
        stream.close()

    async def peer(stream: ByteStream, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        for one in (sock, stream.carrier._sock):  # the kernel keeps all of it
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        assert await received(sock, loop) == b""
        await loop.sock_sendall(sock, said)
        sock.shutdown(socket.SHUT_WR)
        await asyncio.sleep(0.05)  # longer than it takes until nothing is read any more, and the end has come
        assert not found
        data_plane = stream.carrier.plane
        data_plane.run(lambda: go_on[0].set(None))

    run(read_late, peer)
    assert found == said


def test_a_peer_that_reads_slowly_gets_all_that_was_said_before_the_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "FAREWELL_S", 0.02)

    async def answer(stream: ByteStream) -> None:
        await stream.send(DATA[:400_000], None)
        stream.close()

    async def peer(_: ByteStream, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        found = bytearray()
        while data := await loop.sock_recv(sock, 16384):
            found += data
            await asyncio.sleep(0.02)
        assert found == DATA[:400_000]
        sock.close()

    run(answer, peer)


def test_a_peer_that_never_reads_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line, "FAREWELL_S", 0.02)
    monkeypatch.setattr(line, "STALLED_S", 0.1)

    async def answer(stream: ByteStream) -> None:
        while stream.window:
            await stream.send(b"x" * min(stream.window, 16384), None)
            stream.carrier.flush()
        stream.close()

    async def peer(stream: ByteStream, _sock: socket.socket, _loop: asyncio.AbstractEventLoop) -> None:
        await eventually(lambda: stream.carrier._closed)

    run(answer, peer)
