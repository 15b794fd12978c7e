"""The two paths, end to end in one process: what crosses a tunnel, and how it ends."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from control.api.identity import SpiffeId
from control.api.policy import Action, AuthorizationPolicy, Rule, Source
from control.api.workload import Workload
from control.server.ca import Authority
from tests.support.pair import DB_ADDRESS, Pair, running_pair
from tests.support.waiting import until
from uproxy import inbound, plane, pool, tunnel
from uproxy.errors import Flag

Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.create(tmp_path_factory.mktemp("ca") / "ca", "cluster.local")


def run(tmp_path: Path, authority: Authority, server: Server, client: Callable[[Pair], Awaitable[None]]) -> None:
    """Serve as db's application, and run the client against the pair."""

    async def main() -> None:
        app = await asyncio.start_server(server, DB_ADDRESS, 0)
        port = app.sockets[0].getsockname()[1]
        try:
            async with running_pair(tmp_path, authority, port) as pair, asyncio.timeout(90):
                await client(pair)
                for _ in range(200):
                    if not pair.plane.tasks:
                        break
                    await asyncio.sleep(0.01)
                assert not pair.plane.tasks, "a connection's coroutine is left"
                assert not pair.web.connections
                assert not pair.db.connections
        finally:
            app.close()

    plane.run(main())


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
    writer.close()


async def receive_all(sock: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    received = bytearray()
    while data := await loop.sock_recv(sock, 65536):
        received += data
    return bytes(received)


def test_bytes_and_ends_cross_both_ways(tmp_path: Path, authority: Authority) -> None:
    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()
        app = pair.dial()
        await loop.sock_sendall(app, b"hello")
        assert await loop.sock_recv(app, 100) == b"hello"
        app.shutdown(socket.SHUT_WR)
        assert await loop.sock_recv(app, 100) == b"", "FIN came back as FIN"
        app.close()
        await asyncio.sleep(0.05)
        (sent,) = pair.web.telemetry.ended
        (got,) = pair.db.telemetry.ended
        assert (sent.flag, sent.bytes_sent, sent.bytes_received) == (Flag.NONE, 5, 5)
        assert (got.flag, got.bytes_sent, got.bytes_received) == (Flag.NONE, 5, 5)
        assert sent.request_id == got.request_id
        assert (sent.destination.identity, got.source.identity) == (
            "spiffe://cluster.local/ns/shop/sa/db",
            "spiffe://cluster.local/ns/shop/sa/web",
        )

    run(tmp_path, authority, echo, client)


def test_large_content_is_equal_both_ways_at_once(tmp_path: Path, authority: Authority) -> None:
    content = os.urandom(20 << 20)

    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()
        app = pair.dial()
        async with asyncio.TaskGroup() as group:
            received = group.create_task(receive_all(app))
            await loop.sock_sendall(app, content)
            app.shutdown(socket.SHUT_WR)
        assert hashlib.sha256(received.result()).digest() == hashlib.sha256(content).digest()
        app.close()

    run(tmp_path, authority, echo, client)


def test_many_connections_share_one_tunnel(tmp_path: Path, authority: Authority) -> None:
    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()

        async def one(number: int) -> None:
            app = pair.dial()
            message = b"%d" % number
            await loop.sock_sendall(app, message)
            assert await loop.sock_recv(app, 100) == message
            app.close()

        async with asyncio.TaskGroup() as group:
            for number in range(50):
                group.create_task(one(number))
        assert len(pair.web.pool.tunnels()) == 1

    run(tmp_path, authority, echo, client)


def test_new_connections_avoid_a_tunnel_that_carries_bulk(tmp_path: Path, authority: Authority) -> None:
    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()

        async def echoed(app: socket.socket, size: int) -> None:
            sending = asyncio.ensure_future(loop.sock_sendall(app, bytes(size)))  # noqa: TID251  # awaited below
            left = size
            while left:
                left -= len(await loop.sock_recv(app, 1 << 20))
            await sending

        def tick() -> None:
            pair.web.pool.tick(time.monotonic())

        bulk = pair.dial()
        await echoed(bulk, tunnel.BULK_BYTES)
        pair.plane.run(tick)
        small = pair.dial()
        await echoed(small, 64)
        first, second = pair.web.pool.tunnels()
        assert first.carries_bulk
        assert [len(one.connection.streams) for one in (first, second)] == [1, 1]
        pair.plane.run(tick)  # nothing has moved since
        assert not first.carries_bulk
        for app in (bulk, small):
            app.close()

    run(tmp_path, authority, echo, client)


def test_an_old_tunnel_takes_no_new_connections_and_ends_with_its_last(tmp_path: Path, authority: Authority) -> None:
    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()
        early = pair.dial()
        await loop.sock_sendall(early, b"early")
        assert await loop.sock_recv(early, 100) == b"early"
        (old,) = pair.web.pool.tunnels()
        assert pool.MAX_AGE_S * 0.9 <= old.retire_at - time.monotonic() <= pool.MAX_AGE_S
        old.retire_at = time.monotonic() - 1
        pair.plane.run(lambda: pair.web.pool.tick(time.monotonic()))
        late = pair.dial()
        for app in (late, early):
            await loop.sock_sendall(app, b"both")
            assert await loop.sock_recv(app, 100) == b"both"
        assert len(pair.web.pool.tunnels()) == 2
        early.close()
        await until(lambda: not old.connection.streams)
        pair.plane.run(lambda: pair.web.pool.tick(time.monotonic()))
        await until(lambda: old.closed)
        await loop.sock_sendall(late, b"still")
        assert await loop.sock_recv(late, 100) == b"still"
        late.close()

    run(tmp_path, authority, echo, client)


def test_a_reset_by_the_application_is_a_reset_at_the_peer(tmp_path: Path, authority: Authority) -> None:
    seen: list[BaseException | bytes] = []

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(100):
                writer.write(data)
            seen.append(b"")
        except ConnectionResetError as error:
            seen.append(error)
        writer.close()

    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()
        app = pair.dial()
        await loop.sock_sendall(app, b"x")
        await loop.sock_recv(app, 1)
        app.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        app.close()
        await asyncio.sleep(0.1)
        assert isinstance(seen[0], ConnectionResetError)
        assert pair.web.telemetry.ended[0].flag is Flag.RESET

    run(tmp_path, authority, server, client)


def test_a_reset_by_the_server_is_a_reset_at_the_caller(tmp_path: Path, authority: Authority) -> None:
    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()
        app = pair.dial()
        await loop.sock_sendall(app, b"x")
        with pytest.raises(ConnectionResetError):
            await loop.sock_recv(app, 1)
        app.close()

    run(tmp_path, authority, server, client)


def test_the_server_may_end_first(tmp_path: Path, authority: Authority) -> None:
    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.write_eof()
        seen.append(await reader.read())
        writer.close()

    seen: list[bytes] = []

    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()
        app = pair.dial()
        assert await receive_all(app) == b"bye"
        await loop.sock_sendall(app, b"still here")
        app.close()
        await asyncio.sleep(0.05)
        assert seen == [b"still here"]

    run(tmp_path, authority, server, client)


def test_a_slow_reader_holds_up_its_sender_and_nobody_else(tmp_path: Path, authority: Authority) -> None:
    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()
        slow = pair.dial()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sender = asyncio.create_task(loop.sock_sendall(slow, bytes(32 << 20)))  # noqa: TID251 - cancelled below
        await asyncio.sleep(0.3)
        assert not sender.done(), "32 MiB fit nowhere: the sender must wait"
        quick = pair.dial()
        for _ in range(100):
            await loop.sock_sendall(quick, b"x" * 100)
            assert await loop.sock_recv(quick, 1000)
        quick.close()
        sender.cancel()
        slow.close()
        await asyncio.sleep(0.05)

    run(tmp_path, authority, echo, client)


def deny(source: str) -> AuthorizationPolicy:
    rule = Rule(sources=(Source(principals=(source,)),))
    return AuthorizationPolicy("shop", "deny", Action.DENY, None, (rule,))


def test_a_forbidden_caller_gets_a_reset_and_both_logs_say_why(tmp_path: Path, authority: Authority) -> None:
    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()
        pair.apply_policy(deny("cluster.local/ns/shop/sa/web"))
        app = pair.dial()
        with pytest.raises(ConnectionResetError):
            await loop.sock_recv(app, 1)
        app.close()
        (refused,) = pair.db.telemetry.ended
        (told,) = pair.web.telemetry.ended
        assert (refused.flag, told.flag) == (Flag.DENY, Flag.DENY)
        assert refused.policy == told.policy == "shop/deny[0]"
        assert refused.request_id == told.request_id

    run(tmp_path, authority, echo, client)


def test_a_new_policy_cuts_the_connections_that_no_longer_pass(tmp_path: Path, authority: Authority) -> None:
    async def client(pair: Pair) -> None:
        loop = asyncio.get_running_loop()
        app = pair.dial()
        await loop.sock_sendall(app, b"x")
        assert await loop.sock_recv(app, 1) == b"x"
        pair.apply_policy(deny("cluster.local/ns/shop/sa/other"))
        await loop.sock_sendall(app, b"y")
        assert await loop.sock_recv(app, 1) == b"y"
        pair.apply_policy(deny("cluster.local/ns/shop/sa/web"))
        with pytest.raises(ConnectionResetError):
            await loop.sock_recv(app, 1)
        app.close()

    run(tmp_path, authority, echo, client)


class TestDeletedWorkload:
    """Its callers and its own uProxy learn of the deletion one after the other, in any order."""

    def test_what_has_begun_goes_on_and_what_is_new_may_try_elsewhere(
        self, tmp_path: Path, authority: Authority
    ) -> None:
        async def client(pair: Pair) -> None:
            loop = asyncio.get_running_loop()
            app = pair.dial()
            await loop.sock_sendall(app, b"x")
            assert await loop.sock_recv(app, 1) == b"x"
            pair.withdraw(own_record(pair))
            await loop.sock_sendall(app, b"y")
            assert await loop.sock_recv(app, 1) == b"y"
            await refused(pair)
            told = pair.db.telemetry.ended[0]
            assert told.flag is Flag.NO_CONFIG
            app.close()

        run(tmp_path, authority, echo, client)

    def test_policy_still_cuts_what_has_begun(self, tmp_path: Path, authority: Authority) -> None:
        async def client(pair: Pair) -> None:
            loop = asyncio.get_running_loop()
            app = pair.dial()
            await loop.sock_sendall(app, b"x")
            assert await loop.sock_recv(app, 1) == b"x"
            pair.withdraw(own_record(pair))
            pair.apply_policy(deny("cluster.local/ns/shop/sa/web"))
            with pytest.raises(ConnectionResetError):
                await loop.sock_recv(app, 1)
            app.close()

        run(tmp_path, authority, echo, client)

    def test_what_has_begun_has_some_time(
        self, tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(inbound, "LEAVING_S", 0.2)

        async def client(pair: Pair) -> None:
            loop = asyncio.get_running_loop()
            app = pair.dial()
            await loop.sock_sendall(app, b"x")
            assert await loop.sock_recv(app, 1) == b"x"
            own = own_record(pair)
            pair.withdraw(own)
            pair.apply(own)  # it is back: what was to end stays
            await asyncio.sleep(0.4)
            await loop.sock_sendall(app, b"y")
            assert await loop.sock_recv(app, 1) == b"y"
            pair.withdraw(own)
            with pytest.raises(ConnectionResetError):
                await loop.sock_recv(app, 1)
            (cut,) = pair.db.telemetry.ended
            assert "no longer has this workload" in cut.error
            app.close()

        run(tmp_path, authority, echo, client)

    def test_connection_that_is_being_made_may_try_elsewhere(self, tmp_path: Path, authority: Authority) -> None:
        async def client(pair: Pair) -> None:
            own = own_record(pair)
            connect = pair.plane.connect

            async def connect_slowly(*arguments: object, **options: object) -> socket.socket:
                made = await connect(*arguments, **options)  # type: ignore[arg-type]
                if arguments[1] == pair.app_port:
                    pair.withdraw(own)
                return made

            pair.plane.connect = connect_slowly  # type: ignore[method-assign, assignment]
            await refused(pair)
            assert pair.db.telemetry.ended[0].flag is Flag.NO_CONFIG

        run(tmp_path, authority, echo, client)


def own_record(pair: Pair) -> Workload:
    own = pair.state.workload("shop/db")
    assert own is not None
    return own


async def refused(pair: Pair) -> None:
    app = pair.dial()
    with pytest.raises(ConnectionResetError):
        await asyncio.get_running_loop().sock_recv(app, 1)
    app.close()


def test_an_unknown_destination_is_refused(tmp_path: Path, authority: Authority) -> None:
    async def client(pair: Pair) -> None:
        app = pair.dial("240.240.1.2", 80)
        with pytest.raises(ConnectionResetError):
            await asyncio.get_running_loop().sock_recv(app, 1)
        app.close()
        assert pair.web.telemetry.ended[0].flag is Flag.NO_CONFIG

    run(tmp_path, authority, echo, client)


def test_a_peer_with_another_identity_is_refused(tmp_path: Path, authority: Authority) -> None:
    async def client(pair: Pair) -> None:
        from control.api.workload import Endpoint

        other = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/other")
        service = pair.state.service("shop/db")
        assert service is not None
        endpoint = Endpoint("shop/db", "shop/db", DB_ADDRESS, other, {6379: pair.app_port}, 1, True, {})
        pair.apply(dataclasses.replace(service, identities=(other,)), endpoint)
        app = pair.dial()
        with pytest.raises(ConnectionResetError):
            await asyncio.get_running_loop().sock_recv(app, 1)
        app.close()
        assert pair.web.telemetry.ended[0].flag is Flag.IDENTITY
        assert not pair.db.connections

    run(tmp_path, authority, echo, client)


def test_a_dead_application_is_answered_with_503(tmp_path: Path, authority: Authority) -> None:
    async def client(pair: Pair) -> None:
        app = pair.dial(DB_ADDRESS, 1)
        with pytest.raises(ConnectionResetError):
            await asyncio.get_running_loop().sock_recv(app, 1)
        app.close()
        assert "http status: 503" in pair.web.telemetry.ended[0].error
        assert "app-unreachable" in pair.db.telemetry.ended[0].error

    run(tmp_path, authority, echo, client)
