"""A waypoint that passes on whatever it is asked for to `db` of `pair`, with the caller's name, as ours do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

from control.api.address import HBONE_PORT, parse_address
from control.api.gateway import Gateway, Instance, Traffic
from control.api.identity import SpiffeId
from control.server.ca import Authority
from tests.support.certificates import DB
from tests.support.pair import DB_ADDRESS, Pair, connected_pair, issued
from uproxy import plane
from uproxy.errors import RefusedError
from uproxy.header_block import Headers
from uproxy.listener import Listeners, TunnelServer, refuse
from uproxy.pool import Pool
from uproxy.relay import Relay
from uproxy.resolve import Hop, host_port
from uproxy.tls import Credentials, client_context, server_context
from uproxy.tunnel import Tunnel

WAYPOINT = SpiffeId.parse("spiffe://cluster.local/ns/shop/sa/wp")
WAYPOINT_ADDRESS = parse_address("127.0.77.3")
GATEWAY = Gateway("shop", "wp", Traffic.ALL, (Instance("shop/wp-1", WAYPOINT_ADDRESS),), ("shop/db",), ("shop/db",))


class PassingWaypoint:
    """`asked` holds the peer and the authority of each stream that it took."""

    def __init__(self, pair: Pair, directory: Path) -> None:
        credentials = Credentials.load(directory)
        contexts = client_context(credentials), server_context(credentials)
        self.asked: list[tuple[SpiffeId, str]] = []
        self.pool = Pool(pair.plane, lambda: contexts[0], (WAYPOINT_ADDRESS,))
        self.server = TunnelServer(pair.plane, lambda: contexts[1], "cluster.local", self._on_request, lambda *_: None)
        self._pair = pair

    def _on_request(self, carrier: Tunnel, relay: Relay, headers: Headers, ended: bool) -> None:
        self.asked.append((carrier.peer, dict(headers)[b":authority"].decode()))
        self._pair.plane.spawn(self._pass_on(carrier, relay))

    async def _pass_on(self, carrier: Tunnel, relay: Relay) -> None:
        caller = f"{carrier.peer};{host_port(carrier.peer_address, carrier.peer_port)}".encode()
        try:
            onward = await self.ask(caller)
        except RefusedError as error:
            refuse(carrier, relay, error, "0" * 32)
            return
        carrier.respond(relay, ((b":status", b"200"),))
        for one, sock in zip((relay, onward), connected_pair(), strict=True):
            plane.reset_on_close(sock)
            one.attach(sock)
        await relay.done
        await onward.done

    async def ask(self, *callers: bytes) -> Relay:
        """A CONNECT to db's application. Raises RefusedError."""
        authority = f"{DB_ADDRESS}:{self._pair.app_port}".encode()
        named = tuple((b"x-uproxy-caller", caller) for caller in callers)
        request = ((b":method", b"CONNECT"), (b":authority", authority), *named)
        return await self.pool.connect(Hop(DB_ADDRESS, DB, authority, None), request)


@contextlib.contextmanager
def running_waypoint(
    pair: Pair, directory: Path, authority: Authority, identity: SpiffeId = WAYPOINT
) -> Iterator[PassingWaypoint]:
    waypoint = PassingWaypoint(pair, issued(authority, directory / identity.service_account, identity))
    listeners = Listeners(pair.plane)
    listeners.listen(WAYPOINT_ADDRESS, HBONE_PORT, waypoint.server.serve)
    try:
        yield waypoint
    finally:
        listeners.close()
        pair.plane.run(waypoint.server.close)
        pair.plane.run(waypoint.pool.close)


async def exchange(app: socket.socket, content: bytes = b"hello") -> bytes:
    """What an application that echoes gives back; `b""` when the connection ends, in whatever way."""
    loop = asyncio.get_running_loop()
    try:
        await loop.sock_sendall(app, content)
        return await loop.sock_recv(app, len(content))
    except ConnectionError:
        return b""
    finally:
        app.close()
