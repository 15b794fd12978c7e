"""A waypoint between the two uProxies of `pair`, in the same process and on the same plane.

`web` dials `shop/db` on its virtual address, which is bound to Gateway `shop/wp` at 127.0.77.3; db's application is an
HTTP server, or one of bytes, that a test brings.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from control.api.address import HBONE_PORT, parse_address
from control.api.gateway import Binding, Bound, Gateway, Instance, Traffic, Via
from control.api.identity import SpiffeId
from control.api.workload import Service, ServicePort
from control.server.ca import Authority
from tests.support.certificates import DB
from tests.support.pair import (
    DB_ADDRESS,
    SERVICE_PORT,
    VIP,
    Pair,
    Proxy,
    connected_pair,
    issued,
    running_pair,
    workload,
)
from uproxy import plane
from uproxy.connections import Connections
from uproxy.directory import Directory
from uproxy.listener import Listeners, TunnelServer
from uproxy.pool import Pool
from uproxy.redirect import OriginalDestination, Route
from uproxy.telemetry import Connection
from uproxy.tls import Credentials, client_context, server_context
from waypoint import gateway
from waypoint.telemetry import Exchange, WaypointTelemetry
from waypoint.upstream import Upstream
from waypoint.ways import Tunnels

WP = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/wp")
WP_ADDRESS = parse_address("127.0.77.3")

Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Recorder(WaypointTelemetry):
    """Keeps what was recorded."""

    def __init__(self) -> None:
        super().__init__("test")
        self.exchanges: list[Exchange] = []
        self.ended: list[Connection] = []

    def answered(self, exchange: Exchange, now: float) -> None:
        super().answered(exchange, now)
        self.exchanges.append(exchange)

    def closed(self, connection: Connection, now: float) -> None:
        super().closed(connection, now)
        self.ended.append(connection)


@dataclass
class Between:
    """The pair, and some waypoint between its two."""

    pair: Pair

    async def open(self, caller: Proxy | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection of an application of web's, or of another caller's, to db."""
        app, proxied = connected_pair()
        destination = OriginalDestination(VIP, SERVICE_PORT, Route.TUNNEL)
        self.pair.plane.spawn((caller or self.pair.web).outbound.serve(proxied, destination))
        return await asyncio.open_connection(sock=app)

    @contextlib.asynccontextmanager
    async def door(self, caller: Proxy | None = None) -> AsyncIterator[int]:
        """A port of 127.0.0.1 whose connections are web's to db, or another caller's, for programs of their own."""
        loop = asyncio.get_running_loop()
        data_plane, web = self.pair.plane, (caller or self.pair.web).outbound
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as the listeners of a uProxy
            listener.setblocking(False)

            async def accept() -> None:
                while True:
                    sock, _ = await loop.sock_accept(listener)
                    sock.setblocking(False)
                    serving = web.serve(sock, OriginalDestination(VIP, SERVICE_PORT, Route.TUNNEL))
                    data_plane.run(lambda serving=serving: data_plane.spawn(serving))

            async with asyncio.TaskGroup() as tasks:
                accepting = tasks.create_task(accept())
                try:
                    yield listener.getsockname()[1]
                finally:
                    accepting.cancel()


@dataclass
class Through(Between):
    """The pair, and the waypoint's parts."""

    gateway: gateway.Gateway
    upstream: Upstream
    connections: Connections
    telemetry: Recorder
    server: TunnelServer
    pool: Pool


@contextlib.asynccontextmanager
async def bound_pair(directory: Path, authority: Authority, app_port: int, protocol: str) -> AsyncIterator[Pair]:
    """The pair, and what is said of a waypoint that somebody else runs. The arguments: as of `running_waypoint`."""
    async with running_pair(directory, authority, app_port) as pair:
        bound = Bound(0, ("shop/wp",), (), True)
        service = Service(
            "shop",
            "db",
            (VIP,),
            (ServicePort("", SERVICE_PORT, app_port, protocol),),
            {},
            (DB,),
            Binding("shop/wp", Via.WAYPOINT),
        )
        pair.apply(
            service,
            replace(workload("db", DB_ADDRESS, DB), bounds=(bound,)),
            replace(workload("wp-1", WP_ADDRESS, WP), service_account="wp"),
            Gateway("shop", "wp", Traffic.SERVICE, (Instance("shop/wp-1", WP_ADDRESS),), ("shop/db",), ()),
        )
        yield pair


@contextlib.asynccontextmanager
async def running_waypoint(
    directory: Path, authority: Authority, app_port: int, protocol: str, known: Directory | None = None
) -> AsyncIterator[Through]:
    """`protocol` is the service port's appProtocol; `app_port` as for `running_pair`; `known` is the directory."""
    async with bound_pair(directory, authority, app_port, protocol) as pair:
        credentials = Credentials.load(issued(authority, directory / "wp", WP))
        contexts = client_context(credentials), server_context(credentials)
        pool = Pool(pair.plane, lambda: contexts[0], (WP_ADDRESS,))
        upstream, connections, telemetry = Upstream(pair.plane, Tunnels(pool)), Connections(), Recorder()
        waypoint = gateway.Gateway(
            pair.plane,
            pair.state,
            "shop/wp",
            WP,
            upstream,
            connections,
            telemetry,
            known,
            "shop/wp-1",
            (directory / "wp").resolve(),
        )
        server = TunnelServer(
            pair.plane, lambda: contexts[1], "cluster.local", waypoint.on_request, lambda *_: None, queues=True
        )
        listeners = Listeners(pair.plane)
        listeners.listen(WP_ADDRESS, HBONE_PORT, server.serve)
        try:
            yield Through(pair, waypoint, upstream, connections, telemetry, server, pool)
        finally:
            listeners.close()
            pair.plane.run(waypoint.close_idle)
            pair.plane.run(upstream.close)
            pair.plane.run(pool.close)
            pair.plane.run(server.close)
            await asyncio.sleep(0.01)


async def settled(through: Between) -> None:
    """Wait until no coroutine of the data plane is left."""
    for _ in range(200):
        if not through.pair.plane.tasks:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"left: {through.pair.plane.tasks}")


def run_through(
    directory: Path,
    authority: Authority,
    server: Server,
    client: Callable[[Through], Awaitable[None]],
    protocol: str = "http",
    known: Directory | None = None,
) -> None:
    """Serve as db's application, and run the client against the waypoint."""

    async def main() -> None:
        app = await asyncio.start_server(server, DB_ADDRESS, 0)
        port = app.sockets[0].getsockname()[1]
        try:
            async with running_waypoint(directory, authority, port, protocol, known) as through, asyncio.timeout(90):
                await client(through)
                through.pair.plane.run(through.gateway.close_idle)
                through.pair.plane.run(through.upstream.close)
                await settled(through)
                assert not through.connections
        finally:
            app.close()

    plane.run(main())
