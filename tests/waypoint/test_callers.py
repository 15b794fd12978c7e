"""50 callers at one address, at random: every request arrives with its own, whatever it is asked by."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from control.api.identity import SpiffeId
from control.server.ca import Authority
from tests.support.envoy_waypoint import running_envoy
from tests.support.http2_peer import Http2Peer, Message, served_by, speaking
from tests.support.pair import DB_ADDRESS, WEB_ADDRESS, Proxy, issued
from tests.support.through_waypoint import Between, Server, running_waypoint, settled
from tests.waypoint.test_gateway import Reader, Writer, answer
from tests.waypoint.test_http2 import GET
from uproxy import plane
from uproxy.outbound import Self

CALLERS: Final = 50
TURNS: Final = 20
AT_ONCE: Final = 10
_TOLD: Final = b"x-forwarded-client-cert"

Ask = Callable[[], Awaitable[str]]
"""Sends a request; who the application took for its caller."""


class Application:
    """Who called over each connection that came."""

    def __init__(self) -> None:
        self.connections: dict[object, Counter[str]] = {}

    def note(self, connection: object, caller: bytes) -> bytes:
        self.connections.setdefault(connection, Counter())[caller.decode()] += 1
        return caller

    async def by_http1(self, reader: Reader, writer: Writer) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                fields = dict(line.partition(b": ")[::2] for line in head.split(b"\r\n"))
                caller = self.note(writer, fields[_TOLD])
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(caller), caller))
        writer.close()

    async def by_http2(self, peer: Http2Peer, stream: int, message: Message) -> None:
        caller = self.note(peer, dict(message.headers)[_TOLD])
        peer.respond(stream, [(b":status", b"200")])
        await peer.send(stream, caller, ends=True)

    def by_grpc(self, _: bytes, context: Any) -> bytes:
        caller = dict(context.invocation_metadata())[_TOLD.decode()]
        return self.note(context.peer(), caller.encode())


async def _by_http1(through: Between, caller: Proxy, stack: AsyncExitStack) -> Ask:
    reader, writer = await through.open(caller)
    stack.callback(writer.close)

    async def ask() -> str:
        writer.write(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
        return (await answer(reader))[2].decode()

    return ask


async def _by_http2(through: Between, caller: Proxy, stack: AsyncExitStack) -> Ask:
    peer = await stack.enter_async_context(speaking(*await through.open(caller)))

    async def ask() -> str:
        return bytes((await peer.answer(peer.request(GET))).body).decode()

    return ask


async def _by_grpc(through: Between, caller: Proxy, stack: AsyncExitStack) -> Ask:
    channel = grpc.insecure_channel(f"127.0.0.1:{await stack.enter_async_context(through.door(caller))}")
    stack.callback(channel.close)
    call = channel.unary_unary("/a/b")

    async def ask() -> str:
        return (await asyncio.to_thread(call, b"", timeout=20)).decode()

    return ask


@contextlib.asynccontextmanager
async def _served(server: Server) -> AsyncIterator[int]:
    app = await asyncio.start_server(server, DB_ADDRESS, 0)
    try:
        yield app.sockets[0].getsockname()[1]
    finally:
        app.close()


@contextlib.asynccontextmanager
async def _served_by_grpc(application: Application) -> AsyncIterator[int]:
    server = grpc.server(ThreadPoolExecutor(AT_ONCE))
    methods = {"b": grpc.unary_unary_rpc_method_handler(application.by_grpc)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a", methods),))
    port = server.add_insecure_port(f"{DB_ADDRESS}:0")
    server.start()
    try:
        yield port
    finally:
        await asyncio.to_thread(server.stop(0).wait)


KINDS: Final[dict[str, tuple[str, Callable[[Application], Any], Callable[..., Awaitable[Ask]]]]] = {
    "HTTP/1.1": ("http", lambda application: _served(application.by_http1), _by_http1),
    "HTTP/2": ("http2", lambda application: _served(served_by(application.by_http2)), _by_http2),
    "gRPC": ("grpc", _served_by_grpc, _by_grpc),
}


@contextlib.asynccontextmanager
async def _built_in(directory: Path, authority: Authority, app_port: int, protocol: str) -> AsyncIterator[Between]:
    async with running_waypoint(directory, authority, app_port, protocol) as through:
        yield through
        through.pair.plane.run(through.gateway.close_idle)
        through.pair.plane.run(through.upstream.close)
        await settled(through)


@contextlib.asynccontextmanager
async def _envoy(directory: Path, authority: Authority, app_port: int, protocol: str) -> AsyncIterator[Between]:
    async with running_envoy(directory, authority, app_port, protocol) as (between, _):
        yield between


@pytest.mark.parametrize("running", [_built_in, _envoy])
@pytest.mark.parametrize("kind", KINDS)
def test_every_request_arrives_with_its_own_caller(
    identities: Path, authority: Authority, kind: str, running: Callable[..., AbstractAsyncContextManager[Between]]
) -> None:
    protocol, served, opened = KINDS[kind]
    application = Application()
    pick = random.Random(7)

    def caller(through: Between, number: int) -> Proxy:
        identity = SpiffeId.parse(f"spiffe://cluster.local/ns/shop/sa/caller-{number}")
        own = Self("shop/web", str(identity), identity.trust_domain, (WEB_ADDRESS,))
        directory = issued(authority, identities / f"caller-{number}", identity)
        return Proxy(through.pair.plane, through.pair.state, own, directory)

    async def main() -> None:
        async with (
            served(application) as port,
            asyncio.timeout(100),
            running(identities, authority, port, protocol) as through,
            AsyncExitStack() as stack,
        ):
            callers = [caller(through, number) for number in range(CALLERS)]
            for one in callers:
                stack.callback(through.pair.plane.run, one.pool.close)
            asks = [await opened(through, one, stack) for one in callers]
            for _ in range(TURNS):
                some = pick.sample(range(CALLERS), AT_ONCE)
                told = await asyncio.gather(*(asks[number]() for number in some))
                assert told == [f"URI=spiffe://cluster.local/ns/shop/sa/caller-{number}" for number in some]
        _check(application, through)

    plane.run(main())


def _check(application: Application, through: Between) -> None:
    """Each connection to the application had one caller, and its uProxy knew it for the one that it was told."""
    assert all(len(callers) == 1 for callers in application.connections.values())
    connections = Counter(next(iter(callers)) for callers in application.connections.values())
    assert sum(sum(callers.values()) for callers in application.connections.values()) == TURNS * AT_ONCE
    known = Counter(f"URI={record.caller}" for record in through.pair.db.telemetry.ended)
    assert known == connections
