"""Another endpoint is tried when the first gave no answer or a 503, and no byte was sent; else the caller is told."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from control.api.address import HBONE_PORT, parse_address
from control.api.identity import SpiffeId
from control.api.workload import Endpoint
from control.server.ca import Authority
from tests.support.certificates import DB, WEB
from tests.support.pair import DB_ADDRESS, SERVICE_PORT, Pair, issued, running_pair
from uproxy import plane, pool, tunnel
from uproxy.errors import RefusedError
from uproxy.header_block import Headers
from uproxy.listener import Listeners, TunnelServer, refuse
from uproxy.relay import Relay
from uproxy.tls import Credentials, server_context

FIRST = parse_address("127.0.77.4")
PATIENCE_S = 20.0
ALWAYS_FIRST = Endpoint("shop/db", "shop/db-first", FIRST, DB, {SERVICE_PORT: 7}, 65_535, True, {})
"""As good as always: db's own endpoint has weight 1."""


class Peer:
    """The uProxy at FIRST: answers every CONNECT with one status. 200 is a stream that is reset when bytes come."""

    def __init__(self, pair: Pair, directory: Path, identity: SpiffeId, status: int) -> None:
        context = server_context(
            Credentials.load(issued(Authority.open(directory / "ca"), directory / "first", identity))
        )
        self.asked = 0
        self.server = TunnelServer(pair.plane, lambda: context, "cluster.local", self._on_request, lambda *_: None)
        self._plane, self._status = pair.plane, status

    def _on_request(self, carrier: tunnel.Tunnel, relay: Relay, headers: Headers, ended: bool) -> None:
        self.asked += 1
        if self._status != 200:
            refuse(carrier, relay, RefusedError("told", "by the test", status=self._status), "0" * 32)
            return
        carrier.respond(relay, ((b":status", b"200"),))
        self._hanging_up = asyncio.get_running_loop().create_task(self._hang_up(relay))

    async def _hang_up(self, relay: Relay) -> None:
        await until(lambda: bool(relay._pending))
        self._plane.run(lambda: relay.cut("by the test"))


@contextlib.contextmanager
def first_endpoint(pair: Pair, directory: Path, identity: SpiffeId, status: int) -> Iterator[Peer]:
    peer = Peer(pair, directory, identity, status)
    listeners = Listeners(pair.plane)
    listeners.listen(FIRST, HBONE_PORT, peer.server.serve)
    try:
        yield peer
    finally:
        listeners.close()
        pair.plane.run(peer.server.close)


def run(directory: Path, client: Callable[[Pair], Awaitable[None]]) -> None:
    """db's application echoes."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def main() -> None:
        authority = Authority.create(directory / "ca", "cluster.local")
        app = await asyncio.start_server(echo, DB_ADDRESS, 0)
        try:
            port = app.sockets[0].getsockname()[1]
            async with running_pair(directory, authority, port) as pair, asyncio.timeout(PATIENCE_S):
                await client(pair)
                await until(lambda: not pair.plane.tasks)
        finally:
            app.close()

    plane.run(main())


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def said(pair: Pair) -> bytes:
    """What comes back of a message. A reset raises ConnectionResetError."""
    loop = asyncio.get_running_loop()
    with pair.dial() as app:
        await loop.sock_sendall(app, b"hello")
        return await loop.sock_recv(app, 100)


def test_an_endpoint_at_which_nobody_listens_costs_no_connection(tmp_path: Path) -> None:
    async def client(pair: Pair) -> None:
        pair.apply(ALWAYS_FIRST)
        assert await said(pair) == b"hello"
        assert pair.web.pool.health.is_bad(FIRST)
        assert await said(pair) == b"hello"

    run(tmp_path, client)


@pytest.mark.parametrize(("identity", "asked"), [(DB, 1), (WEB, 0)], ids=["503", "somebody else is there"])
def test_an_endpoint_that_cannot_serve_costs_no_connection(tmp_path: Path, identity: SpiffeId, asked: int) -> None:
    async def client(pair: Pair) -> None:
        with first_endpoint(pair, tmp_path, identity, 503) as first:
            pair.apply(ALWAYS_FIRST)
            for _ in range(5):
                assert await said(pair) == b"hello"
            assert first.asked == asked, "then it comes last for a while"

    run(tmp_path, client)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500])
def test_an_answer_is_an_answer(tmp_path: Path, status: int) -> None:
    async def client(pair: Pair) -> None:
        with first_endpoint(pair, tmp_path, DB, status) as first:
            pair.apply(ALWAYS_FIRST)
            for _ in range(2):
                with pytest.raises(ConnectionResetError):
                    await said(pair)
            assert first.asked == 2
            await until(lambda: len(pair.web.telemetry.ended) == 2)
            assert not pair.db.telemetry.ended

    run(tmp_path, client)


def test_nothing_is_tried_again_once_a_byte_was_sent(tmp_path: Path) -> None:
    async def client(pair: Pair) -> None:
        with first_endpoint(pair, tmp_path, DB, 200) as first:
            pair.apply(ALWAYS_FIRST)
            with pytest.raises(ConnectionResetError):
                await said(pair)
            assert first.asked == 1
            assert not pair.db.telemetry.ended
            assert not pair.db.connections

    run(tmp_path, client)


def test_a_storm_of_failures_is_not_made_twice_as_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uproxy.health.BUDGET_FLOOR", 0)
    monkeypatch.setattr("uproxy.health.BUDGET_SHARE", 0.0)

    async def client(pair: Pair) -> None:
        pair.web.outbound._budget._floor = 0
        pair.apply(ALWAYS_FIRST)
        with pytest.raises(ConnectionResetError):
            await said(pair)
        assert not pair.db.telemetry.ended

    run(tmp_path, client)


# -- how tunnels end by themselves


def test_a_tunnel_that_nobody_uses_ends_and_one_with_a_silent_connection_stays(tmp_path: Path) -> None:
    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()
        app = pair.dial()
        await loop.sock_sendall(app, b"x")
        assert await loop.sock_recv(app, 1) == b"x"
        (carrier,) = pair.web.pool.tunnels()
        carrier._heard_at = late = time.monotonic() + pool.IDLE_TIMEOUT_S + 1  # it is not the keepalive that ends it
        pair.plane.run(lambda: pair.web.pool.tick(late))
        await asyncio.sleep(0.05)
        assert not carrier.closed
        app.close()
        await until(lambda: not carrier.connection.streams)
        pair.plane.run(lambda: pair.web.pool.tick(carrier.idle_since + pool.IDLE_TIMEOUT_S - 1))
        await asyncio.sleep(0.05)
        assert not carrier.closed
        pair.plane.run(lambda: pair.web.pool.tick(carrier.idle_since + pool.IDLE_TIMEOUT_S + 1))
        await until(lambda: carrier.closed and not pair.db.inbound.server.tunnels())

    run(tmp_path, client)


def test_a_server_too_asks_a_silent_caller_and_gives_up_who_does_not_answer(tmp_path: Path) -> None:
    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()
        app = pair.dial()
        await loop.sock_sendall(app, b"x")
        assert await loop.sock_recv(app, 1) == b"x"
        (near,), (far,) = pair.web.pool.tunnels(), pair.db.inbound.server.tunnels()
        asked_at = time.monotonic() + tunnel.KEEPALIVE_S + 1
        pair.plane.run(lambda: pair.db.inbound.server.tick(asked_at))
        await until(lambda: far._pinged_at is None)  # answered
        pair.plane.run(lambda: pair.db.inbound.server.tick(asked_at + tunnel.KEEPALIVE_TIMEOUT_S + 1))
        await asyncio.sleep(0.05)
        assert not far.closed
        pair.plane.rearm(near._sock.fileno(), 0)  # it reads nothing any more, as a stopped process does not
        asked_at = far._heard_at + tunnel.KEEPALIVE_S + 1
        pair.plane.run(lambda: pair.db.inbound.server.tick(asked_at))
        pair.plane.run(lambda: pair.db.inbound.server.tick(asked_at + tunnel.KEEPALIVE_TIMEOUT_S + 1))
        await until(lambda: not pair.db.connections)
        pair.plane.rearm(near._sock.fileno(), plane.READ)
        with pytest.raises(ConnectionResetError):
            await loop.sock_recv(app, 1)
        app.close()

    run(tmp_path, client)


def test_a_ping_is_answered_in_time_beside_much_else(tmp_path: Path) -> None:
    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as stack:
            apps = [stack.enter_context(pair.dial()) for _ in range(24)]
            senders = [loop.create_task(loop.sock_sendall(app, bytes(64 << 20))) for app in apps]
            await until(lambda: len(pair.db.connections) == len(apps))  # nobody reads what comes back
            (far, *_) = pair.db.inbound.server.tunnels()
            far._heard_at = asked_at = time.monotonic()
            pair.plane.run(lambda: far.tick(asked_at + tunnel.KEEPALIVE_S))
            assert far._pinged_at is not None
            await until(lambda: far._pinged_at is None)
            assert time.monotonic() - asked_at < tunnel.KEEPALIVE_TIMEOUT_S
            for sender in senders:
                sender.cancel()
            await asyncio.gather(*senders, return_exceptions=True)

    run(tmp_path, client)
