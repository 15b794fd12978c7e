"""One stream's life at a waypoint, from a caller's uProxy: CONNECT -> what is asked for? -> whoever serves that.

Of HTTP, `exchange` serves each request; of opaque TCP, `opaque` the connection. All of it runs in the data plane's
turns.
"""

from __future__ import annotations

import contextlib
import time
from typing import Final

from control.api.address import IpAddress
from control.client.state import Changes, State
from uproxy.connections import Connections
from uproxy.errors import RefusedError
from uproxy.header_block import Headers
from uproxy.listener import Asked, asked_for, refuse, traced
from uproxy.plane import Plane
from uproxy.relay import Relay
from uproxy.telemetry import Connection, Peer
from uproxy.tunnel import Tunnel
from waypoint.byte_stream import ByteStream
from waypoint.caller import Caller
from waypoint.destination import Destinations
from waypoint.directory import Directory
from waypoint.exchange import Exchanges
from waypoint.http1_incoming import Http1Incoming
from waypoint.messages import MessageError
from waypoint.opaque import Opaque
from waypoint.rules import RuleBook
from waypoint.telemetry import WaypointTelemetry
from waypoint.upstream import Upstream

GRACE_S: Final = 1.0
"""Within a drain: how long a connection may wait for a request, which may be on its way."""


class Gateway:
    """Serves the streams of one waypoint process."""

    def __init__(
        self,
        data_plane: Plane,
        state: State,
        gateway: str,
        upstream: Upstream,
        connections: Connections,
        telemetry: WaypointTelemetry,
        directory: Directory | None = None,
    ) -> None:
        """`gateway`: key of the Gateway. `directory`: where what is not known is asked for, if anywhere."""
        self._grace_s = GRACE_S
        self._plane = data_plane
        self._state = state
        self._connections = connections
        self._telemetry = telemetry
        self._directory = directory
        self._destinations = Destinations(state, gateway, upstream.health)
        rules = RuleBook(state, gateway)
        self._exchanges = Exchanges(
            data_plane, state, gateway, self._destinations, rules, upstream, telemetry, directory
        )
        self._opaque = Opaque(data_plane, self._destinations, rules, upstream, connections, telemetry)
        self._idle: dict[Http1Incoming, Asked] = {}

    def on_request(self, carrier: Tunnel, relay: Relay, headers: Headers, ended: bool) -> None:
        """A CONNECT came, on a tunnel from a caller."""
        if ended:
            relay.on_end()
        self._plane.spawn(self._serve(carrier, relay, headers))

    async def _serve(self, carrier: Tunnel, relay: Relay, headers: Headers) -> None:
        """One CONNECT stream, to its end. Never raises."""
        fields = dict(headers)
        caller = Caller(carrier.peer, carrier.peer_address, carrier.peer_port)
        request_id, caller_span = traced(fields)
        record = self._record(caller, request_id)
        try:
            asked = asked_for(fields)
            record.hbone_address = asked.authority
            await self._learn(asked, caller)
            destination = self._destinations.find(asked)
            record.destination_service = destination.service_key
            if not destination.http:
                if caller_span:
                    self._telemetry.follow(record, caller_span)
                await self._opaque.serve(carrier, relay, caller, asked, destination, record)
                return
        except RefusedError as error:
            refuse(carrier, relay, error, record.request_id)
            record.flag, record.error, record.policy = error.flag, str(error), error.policy
            self._telemetry.closed(record, time.monotonic())
            return
        carrier.respond(relay, ((b":status", b"200"),))
        with contextlib.suppress(ConnectionResetError):
            await self._serve_http(Http1Incoming(ByteStream(relay), asked.authority.encode()), caller, asked)

    async def _learn(self, asked: Asked, caller: Caller) -> None:
        """Ask who lives at an address that was dialled by itself, and, for telemetry and without waiting, who calls.

        Raises RefusedError when no answer comes.
        """
        if self._directory is None:
            return
        if self._state.workload_at(caller.address) is None:
            self._plane.spawn(_introduced(self._directory, caller.address))
        unknown = self._destinations.unknown(asked)
        if unknown is not None:
            await self._directory.destination(unknown)

    async def _serve_http(self, client: Http1Incoming, caller: Caller, asked: Asked) -> None:
        """One caller's HTTP/1.1 connection: its requests, one after the other. Raises nothing."""
        while await self._awaited(client, caller, asked):
            await self._exchanges.serve(client, caller, asked)
            if not client.reusable:
                break
        client.close()

    async def _awaited(self, client: Http1Incoming, caller: Caller, asked: Asked) -> bool:
        """Whether there is another request; what is none is refused. Raises nothing."""
        if self._exchanges.draining:
            self._close_later(client)
        self._idle[client] = asked
        try:
            return await client.next() is not None
        except MessageError as error:
            refused = error
        except TimeoutError:
            return False
        except (OSError, RefusedError) as error:  # RefusedError: this proxy shuts down
            client.abort(str(error))
            return False
        finally:
            del self._idle[client]
        await self._exchanges.refuse(client, caller, refused)
        return False

    # -- what changes meanwhile

    def config_changed(self, changes: Changes) -> None:
        """Requests ask anew by themselves; connections of opaque TCP are asked here, and those that wait for a request
        which this waypoint would only refuse are closed.
        """
        if not changes:
            return
        self._connections.reauthorise()
        for client, asked in list(self._idle.items()):
            try:
                self._destinations.find(asked)
            except RefusedError:
                client.close()

    def drain(self, timeout_s: float) -> None:
        """This process ends within `timeout_s`: close connections after their next response, or when none is asked for.

        Whoever has connected or had a response may have sent a request that is not here yet: there is a moment for it.
        """
        self._exchanges.draining = True
        self._grace_s = min(GRACE_S, timeout_s / 2)
        for client in self._idle:
            self._close_later(client)

    def _close_later(self, client: Http1Incoming) -> None:
        def close() -> None:
            if client in self._idle and client.waits:
                client.close()

        self._plane.call_later(self._grace_s, close)

    def close_idle(self) -> None:
        """The drain time is over: end the connections on which no request is under way."""
        for client in list(self._idle):
            client.close()

    def _record(self, caller: Caller, name: str) -> Connection:
        return Connection(
            direction="waypoint",
            source=caller.peer(self._state),
            destination=Peer("-"),
            request_id=name,
            started=time.monotonic(),
        )


async def _introduced(directory: Directory, caller: IpAddress) -> None:
    with contextlib.suppress(RefusedError):  # this proxy shuts down
        await directory.introduce(caller, "")
