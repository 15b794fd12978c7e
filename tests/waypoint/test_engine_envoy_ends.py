"""How tunnels end in an Envoy: when certificates are revoked, and when there are too many of them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from cryptography import x509
from h2.exceptions import ProtocolError

from control.api.address import HBONE_PORT
from control.api.identity import SpiffeId
from control.server.ca import Authority
from tests.support.envoy_waypoint import running_envoy
from tests.support.hand_tunnel import HandTunnel
from tests.support.pair import DB_ADDRESS, SERVICE_PORT, VIP, WEB_ADDRESS, issued
from tests.support.through_waypoint import WP_ADDRESS, Between
from uproxy import plane
from waypoint.engine_envoy import child, rendering
from waypoint.engine_envoy.serving import EnvoyServing

ANN = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/ann")
PATIENCE_S = 40.0


def tunnel(identity: Path) -> HandTunnel:
    made = socket.create_connection((WP_ADDRESS, HBONE_PORT), source_address=(WEB_ADDRESS, 0))
    return HandTunnel(made, identity, f"{VIP}:{SERVICE_PORT}")


def asked(one: HandTunnel) -> int:
    one.send("/")
    return one.receive()[0]


def asked_anew(identity: Path) -> int:
    with contextlib.closing(tunnel(identity)) as one:
        return asked(one)


def eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_ended(one: HandTunnel) -> bool:
    try:
        asked(one)
    except ConnectionError:
        return True
    return False


def is_answered(identity: Path, status: int) -> bool:
    try:
        return asked_anew(identity) == status
    except (ssl.SSLError, ConnectionError, ProtocolError):  # `h2` takes no answer behind a GOAWAY
        return False


def revoke(authority: Authority, directory: Path, identity: str) -> None:
    """In the list that the waypoint reads."""
    found = x509.load_pem_x509_certificate((directory / identity / "chain.pem").read_bytes())
    fresh = directory / "wp" / "crl.new"
    fresh.write_bytes(authority.revoke([found.serial_number]))
    fresh.rename(directory / "wp" / "crl.pem")


async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    writer.close()


@contextlib.asynccontextmanager
async def serving(directory: Path, authority: Authority) -> AsyncIterator[EnvoyServing]:
    server = await asyncio.start_server(hello, DB_ADDRESS, 0)
    try:
        async with running_envoy(directory, authority, server.sockets[0].getsockname()[1], "http") as (_, envoy):
            yield envoy
    finally:
        server.close()


def while_served(directory: Path, authority: Authority, check: Callable[[], None]) -> None:
    async def main() -> None:
        async with serving(directory, authority):
            await asyncio.to_thread(check)

    plane.run(main())


def test_a_revoked_caller_makes_no_new_tunnel_and_what_it_has_open_ends(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "LISTENER_DRAIN_S", 1)

    def check() -> None:
        web, ann = tmp_path / "web", issued(authority, tmp_path / "ann", ANN)
        with contextlib.closing(tunnel(web)) as open_before:
            assert (asked(open_before), asked_anew(ann)) == (200, 200)
            revoke(authority, tmp_path, "web")
            eventually(lambda: has_ended(open_before))
        with pytest.raises((ssl.SSLError, ConnectionError)):
            asked_anew(web)
        assert is_answered(ann, 200)

    while_served(tmp_path, authority, check)


def test_requests_of_a_revoked_caller_are_refused_at_once_and_those_of_others_go_on(
    tmp_path: Path, authority: Authority
) -> None:
    def check() -> None:
        web, ann = tmp_path / "web", issued(authority, tmp_path / "ann", ANN)
        with contextlib.closing(tunnel(web)) as revoked, contextlib.closing(tunnel(ann)) as other:
            assert (asked(revoked), asked(other)) == (200, 200)
            revoke(authority, tmp_path, "web")
            eventually(lambda: asked(revoked) == 403)
            assert asked(other) == 200, "in its old tunnel"

    while_served(tmp_path, authority, check)


def test_a_revoked_backend_gets_no_more_requests(tmp_path: Path, authority: Authority) -> None:
    def check() -> None:
        with contextlib.closing(tunnel(tmp_path / "web")) as one:
            assert asked(one) == 200
            revoke(authority, tmp_path, "db")
            eventually(lambda: asked(one) == 503)

    while_served(tmp_path, authority, check)


def test_a_list_that_says_nothing_new_ends_no_tunnel(tmp_path: Path, authority: Authority) -> None:
    async def main() -> None:
        async with serving(tmp_path, authority) as envoy:
            revoke(authority, tmp_path, "db")
            while not envoy._revocation:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            envoy.renewed()
            assert envoy._revocation == 1

    plane.run(main())


def test_there_are_so_many_tunnels_and_no_more(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "MAX_TUNNELS", 2)

    def check() -> None:
        web = tmp_path / "web"
        with contextlib.closing(tunnel(web)) as first, contextlib.closing(tunnel(web)) as second:
            assert (asked(first), asked(second)) == (200, 200)
            with pytest.raises((ssl.SSLError, ConnectionError)):
                tunnel(web)
        eventually(lambda: is_answered(web, 200))

    while_served(tmp_path, authority, check)


def test_what_an_envoy_cuts_off_never_looks_complete(tmp_path: Path, authority: Authority) -> None:
    """A server that closes first, and a caller that reads more slowly than it sends (docs/engines.md)."""
    size = 4 << 20

    async def sending(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.readexactly(1)
            writer.write(bytes(size))
            await writer.drain()
        writer.close()

    async def received(between: Between) -> int:
        """How much until it ended; -1: it was reset."""
        reader, writer = await between.open()
        writer.write(b"?")
        count = 0
        try:
            while some := await reader.read(1 << 16):
                count += len(some)
                await asyncio.sleep(0.001)
        except ConnectionResetError:
            return -1
        finally:
            writer.close()
        return count

    async def main() -> None:
        server = await asyncio.start_server(sending, DB_ADDRESS, 0)
        port = server.sockets[0].getsockname()[1]
        async with running_envoy(tmp_path, authority, port, "tcp") as (between, _), asyncio.timeout(30):
            assert {await received(between) for _ in range(5)} <= {size, -1}
        server.close()

    plane.run(main())


def test_a_caller_that_reads_nothing_has_an_envoy_hold_little(tmp_path: Path, authority: Authority) -> None:
    sent = 0

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        with contextlib.suppress(ConnectionError):
            await reader.readexactly(1)
            while True:
                writer.write(bytes(1 << 16))
                await writer.drain()
                sent += 1 << 16

    async def main() -> None:
        server = await asyncio.start_server(endless, DB_ADDRESS, 0)
        port = server.sockets[0].getsockname()[1]
        async with running_envoy(tmp_path, authority, port, "tcp") as (between, _), asyncio.timeout(30):
            _, writer = await between.open()
            writer.write(b"?")
            before = -1
            while before != sent or not sent:
                before = sent
                await asyncio.sleep(0.5)
            writer.close()
        server.close()
        assert sent < 24 << 20, "with the buffers of two kernels and two uProxies"

    plane.run(main())
