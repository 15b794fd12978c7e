"""Connections in plaintext at one uProxy, without the kernel: how many there may be, and what becomes of each."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from control.api.gateway import Bound
from control.api.plaintext import Plaintext
from control.server.ca import Authority
from tests.support.pair import DB, DB_ADDRESS, Pair, running_pair, workload
from uproxy import inbound, plane
from uproxy.errors import Flag, RefusedError

PATIENCE_S = 10.0
PERMISSIVE = replace(workload("db", DB_ADDRESS, DB), plaintext=Plaintext(True, ()))


@dataclass
class World:
    """`db`'s uProxy with an application behind it; its listener stands in for the one that the kernel gives to."""

    pair: Pair
    app: socket.socket

    def dial(self) -> socket.socket:
        """What a caller holds. As with sk_lookup, the accepted socket bears the address and port that were dialled."""
        with socket.create_server((DB_ADDRESS, self.pair.app_port + 1)) as listener:
            made = socket.create_connection(listener.getsockname())
            accepted, _ = listener.accept()
        for sock in (made, accepted):
            sock.setblocking(False)
        self.pair.plane.spawn(self.pair.db.inbound.serve_plaintext(accepted))
        return made

    async def accept(self) -> socket.socket:
        async with asyncio.timeout(PATIENCE_S):
            served, _ = await asyncio.get_running_loop().sock_accept(self.app)
        served.setblocking(False)
        return served


def run(tmp_path: Path, test: Callable[[World], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with world(tmp_path) as made:
            await test(made)
            await until(lambda: not made.pair.plane.tasks)

    plane.run(whole())


@contextlib.asynccontextmanager
async def world(tmp_path: Path) -> AsyncIterator[World]:
    authority = Authority.create(tmp_path / "ca", "cluster.local")
    # The application is at the port that is dialled on loopback, which is where the uProxy looks next.
    with socket.create_server(("127.0.0.1", 0)) as app:
        app.setblocking(False)
        async with running_pair(tmp_path, authority, app.getsockname()[1] - 1) as pair:
            pair.apply(PERMISSIVE)
            yield World(pair, app)


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


async def received(sock: socket.socket, size: int = 100) -> bytes:
    async with asyncio.timeout(PATIENCE_S):
        return await asyncio.get_running_loop().sock_recv(sock, size)


def test_no_more_than_so_many_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbound, "MAX_PLAINTEXT", 2)

    async def test(made: World) -> None:
        held = []
        for _ in range(2):
            caller = made.dial()
            held.append((caller, await made.accept()))
        with made.dial() as refused, pytest.raises(ConnectionResetError):
            await received(refused)
        assert "overload" in made.pair.db.telemetry.ended[-1].error
        for caller, served in held[:1]:
            caller.close()
            served.close()
        await until(lambda: len(made.pair.db.connections) == 1)
        with made.dial() as caller, await made.accept() as served:
            caller.send(b"x")
            assert await received(served) == b"x"
        for sock in held[1]:
            sock.close()

    run(tmp_path, test)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (replace(PERMISSIVE, plaintext=None), "takes mTLS only"),
        (
            replace(PERMISSIVE, bounds=(Bound(0, ("shop/wp",), (), enforced=True, guarded=True),)),
            "waypoint-required: made directly",
        ),
    ],
    ids=["strict", "guarded"],
)
def test_a_change_cuts_what_it_would_refuse_with_a_reset(tmp_path: Path, changed: object, reason: str) -> None:
    async def test(made: World) -> None:
        with made.dial() as caller, await made.accept() as served:
            made.pair.apply(changed)
            for sock in (caller, served):
                with pytest.raises(ConnectionResetError):
                    await received(sock)
        ended = made.pair.db.telemetry.ended[-1]
        assert ended.flag is Flag.RESET
        assert reason in ended.error

    run(tmp_path, test)


def test_a_binding_without_a_policy_to_miss_leaves_it_until_it_ends(tmp_path: Path) -> None:
    async def test(made: World) -> None:
        with made.dial() as caller, await made.accept() as served:
            made.pair.apply(replace(PERMISSIVE, bounds=(Bound(0, ("shop/wp",), (), enforced=True),)))
            caller.send(b"x")
            assert await received(served) == b"x"
            with made.dial() as refused, pytest.raises(ConnectionResetError):
                await received(refused)
            assert made.pair.db.telemetry.ended[-1].flag is Flag.WAYPOINT

    run(tmp_path, test)


def test_an_application_that_is_not_there_means_a_reset(tmp_path: Path) -> None:
    async def test(made: World) -> None:
        made.app.close()
        with made.dial() as caller, pytest.raises(ConnectionResetError):
            await received(caller)
        assert "app-unreachable" in made.pair.db.telemetry.ended[-1].error

    run(tmp_path, test)


def test_the_end_of_the_process_resets_what_is_still_open(tmp_path: Path) -> None:
    async def test(made: World) -> None:
        with made.dial() as caller, await made.accept():
            made.pair.plane.run(lambda: made.pair.db.connections.cut_all("the drain time of this proxy is over"))
            made.pair.plane.run(lambda: made.pair.plane.abort(RefusedError("shutting-down", "it is")))
            with pytest.raises(ConnectionResetError):
                await received(caller)

    run(tmp_path, test)


def test_a_peer_that_is_silent_is_asked_whether_it_is_there(tmp_path: Path) -> None:
    async def test(made: World) -> None:
        with made.dial(), await made.accept():
            (record,) = made.pair.db.connections.records()
            peer = record.meter._peer  # type: ignore[union-attr]
            assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            asked = [peer.getsockopt(socket.IPPROTO_TCP, option) for option in (4, 5, 6)]  # IDLE, INTVL, CNT
            assert asked[0] + asked[1] * asked[2] == inbound.PLAINTEXT_GONE_S
            unacknowledged_ms = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            assert unacknowledged_ms == inbound.PLAINTEXT_GONE_S * 1000

    run(tmp_path, test)
