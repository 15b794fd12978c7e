"""One stream's life at a waypoint, from a caller's uProxy: CONNECT -> what is asked for? -> whoever serves that.

Of HTTP, `exchange` serves each request; of opaque TCP, `opaque` the connection. All of it runs in the data plane's
turns.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable
from pathlib import Path
from typing import Final

from control.api.address import IpAddress
from control.api.identity import SpiffeId
from control.client.state import Changes, State
from uproxy.connections import Connections
from uproxy.directory import Directory
from uproxy.errors import RefusedError
from uproxy.hbone import Stream
from uproxy.header_block import Headers
from uproxy.listener import Asked, asked_for, refuse, traced
from uproxy.plane import Plane
from uproxy.relay import Relay
from uproxy.telemetry import Connection, Peer
from uproxy.tunnel import Tunnel
from waypoint import detection
from waypoint.balancers import Balancers
from waypoint.byte_stream import ByteStream
from waypoint.caller import Caller
from waypoint.connection_limits import Limiters
from waypoint.destination import Destination, Destinations
from waypoint.detection import TIMEOUT_S, Begun
from waypoint.exchange import Exchanges
from waypoint.http1_incoming import Http1Incoming
from waypoint.http2_connection import Http2Connection
from waypoint.http2_heads import read_request
from waypoint.http2_incoming import Http2Incoming
from waypoint.messages import UNREAD, MessageError
from waypoint.opaque import Opaque
from waypoint.rules import RuleBook
from waypoint.shedding import Shedding
from waypoint.sides import HEAD_TIMEOUT_S, IDLE_TIMEOUT_S
from waypoint.telemetry import WaypointTelemetry
from waypoint.upstream import Upstream

_Client = Http1Incoming | Http2Connection

GRACE_S: Final = 1.0
"""Within a drain that is no upgrade: how long a connection may wait for a request, which may be on its way."""
TOLD_GRACE_S: Final = 10.0
"""Within an upgrade: likewise for a connection of HTTP/2, whose caller was told; it may be slow to read that."""


class Gateway:
    """Serves the streams of one waypoint process."""

    def __init__(
        self,
        data_plane: Plane,
        state: State,
        gateway: str,
        identity: SpiffeId,
        upstream: Upstream,
        connections: Connections,
        telemetry: WaypointTelemetry,
        directory: Directory | None = None,
        own: str = "",
        closed: Path | None = None,
    ) -> None:
        """`gateway`: key of the Gateway. `identity`: of this process. `directory`: where to ask, if anywhere.

        `own`: key of this process's workload, if it has one. `closed`: a directory that no filter is to open.
        """
        self._grace_s = GRACE_S
        self._plane = data_plane
        self._state = state
        self._connections = connections
        self._telemetry = telemetry
        self._directory = directory
        self._destinations = Destinations(state, gateway, upstream.health, own)
        self._rules = rules = RuleBook(state, gateway)
        limiters = Limiters(data_plane, state, gateway)
        self._exchanges = Exchanges(
            data_plane,
            state,
            gateway,
            identity,
            self._destinations,
            rules,
            upstream,
            limiters,
            connections,
            telemetry,
            directory,
            closed,
        )
        self._shedding = Shedding(data_plane, telemetry)
        self._opaque = Opaque(data_plane, self._destinations, rules, upstream, limiters, connections, telemetry)
        self._waiting: dict[_Client, Asked] = {}
        """Connections of callers that may bring a request: HTTP/1.1 while there is none, HTTP/2 for ever."""

    @property
    def balancers(self) -> Balancers:
        """How backends are chosen."""
        return self._destinations.balancers

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
            if caller_span and not destination.http:
                self._telemetry.follow(record, caller_span)
            if not (destination.http or destination.undeclared):
                await self._opaque.serve(lambda: _taken(carrier, relay), caller, asked, destination, record)
                return
        except RefusedError as error:
            refuse(carrier, relay, error, record.request_id)
            self._refused(record, error)
            return
        with contextlib.suppress(ConnectionResetError):
            await self._serve_stream(_taken(carrier, relay), caller, asked, destination, record)

    async def serve(self, stream: ByteStream, caller: Caller, asked: Asked, request_id: str) -> None:
        """One connection that was handed over, and whose caller is known, to its end. Never raises."""
        record = self._record(caller, request_id)
        record.hbone_address = asked.authority
        try:
            await self._learn(asked, caller)
            destination = self._destinations.find(asked)
            record.destination_service = destination.service_key
            if not (destination.http or destination.undeclared):
                await self._opaque.serve(lambda: stream, caller, asked, destination, record)
                return
        except RefusedError as error:
            stream.abort(str(error))
            self._refused(record, error)
            return
        with contextlib.suppress(ConnectionResetError):
            await self._serve_stream(stream, caller, asked, destination, record)

    def dialled(self, address: IpAddress, port: int, name: str) -> Asked:
        """What a caller has asked for who came to a workload's port, and says that it dialled a service by this name:
        that, if it can be, else the workload itself.
        """
        return self._destinations.dialled(address, port, name)

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

    async def _serve_stream(
        self, stream: ByteStream, caller: Caller, asked: Asked, destination: Destination, record: Connection
    ) -> None:
        """One caller's connection, as what it begins with. Raises ConnectionResetError."""
        newcomer = Http1Incoming(stream, asked.authority.encode())
        self._await(newcomer, asked)
        try:
            if destination.http or self._rules.at(destination).asks_http:
                begun = await stream.told_by(detection.version, IDLE_TIMEOUT_S, HEAD_TIMEOUT_S)
            else:
                begun = await _detected(stream)
        except TimeoutError:
            stream.close()
            return
        except (OSError, RefusedError) as error:  # RefusedError: this proxy shuts down
            stream.abort(str(error))
            return
        finally:
            del self._waiting[newcomer]
        if begun is Begun.HTTP2:
            self._serve_http2(stream, caller, asked, destination.service_key)
        elif begun is Begun.OPAQUE:
            await self._serve_opaque(stream, caller, asked, destination, record)
        else:
            await self._serve_http1(newcomer, stream, caller, asked, destination.service_key)

    async def _serve_http1(
        self, client: Http1Incoming, stream: ByteStream, caller: Caller, asked: Asked, service: str
    ) -> None:
        """Requests, one after the other. `service`: key of what was dialled, for records. Raises nothing."""
        while await self._awaited(client, caller, asked):
            if self._sheds(caller, None if client.pipelined else stream.carrier.waited_s):
                await self._refuse(client, caller, service)
            else:
                await self._exchanges.serve(client, caller, asked)
            if not client.reusable:
                break
        client.close()

    def _sheds(self, caller: Caller, waited_s: float | None, *more: tuple[Hashable, float]) -> bool:
        """Whether there is too much to do for a request. `waited_s`: in its caller's tunnel, as `Overload.sheds` is
        told it; `more`: other ways it came by.
        """
        if self._exchanges.draining:
            return False
        return self._shedding.sheds(((caller.address, caller.port), waited_s), *more)

    async def _refuse(self, client: Http1Incoming, caller: Caller, service: str) -> None:
        """Raises nothing."""
        try:
            await self._shedding.refuse(client, caller.peer(self._state), service)
        except (OSError, RefusedError) as error:  # RefusedError: this proxy shuts down
            client.abort(str(error))

    async def _awaited(self, client: Http1Incoming, caller: Caller, asked: Asked) -> bool:
        """Whether there is another request; what is none is refused. Raises nothing."""
        self._await(client, asked)
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
            del self._waiting[client]
        await self._exchanges.refuse(client, caller, refused)
        return False

    def _serve_http2(self, stream: ByteStream, caller: Caller, asked: Asked, service: str) -> None:
        """Requests, each in a coroutine of its own. `service`: as above. Raises ConnectionResetError."""

        def take(connection: Http2Connection, one: Stream, headers: Headers, ended: bool) -> None:
            if self._sheds(caller, stream.carrier.waited_s, (connection, connection.waited_s)):
                self._shedding.refuse_stream(connection, one, headers, caller.peer(self._state), service)
                return
            try:
                head = read_request(headers, ended=ended)
            except MessageError as error:
                nobodys = Http2Incoming(connection, one, UNREAD, ended=ended)
                self._plane.spawn(self._exchanges.refuse(nobodys, caller, error))
            else:
                request = Http2Incoming(connection, one, head, ended=ended)
                self._plane.spawn(self._exchanges.serve(request, caller, asked))

        def gone(connection: Http2Connection) -> None:
            self._waiting.pop(connection, None)
            self._shedding.forget(connection)

        connection = Http2Connection(stream, gone, IDLE_TIMEOUT_S, take)
        if not connection.closed:
            self._waiting[connection] = asked
            if self._exchanges.draining:
                self._leave(connection)

    async def _serve_opaque(
        self, stream: ByteStream, caller: Caller, asked: Asked, destination: Destination, record: Connection
    ) -> None:
        """What turned out not to be HTTP. Raises nothing."""
        try:
            await self._opaque.serve(lambda: stream, caller, asked, destination, record)
        except RefusedError as error:
            stream.abort(str(error))
            self._refused(record, error)

    def _await(self, client: Http1Incoming, asked: Asked) -> None:
        """It waits for a request; within a drain, not for long."""
        self._waiting[client] = asked
        if self._exchanges.draining:
            self._leave(client)

    # -- what changes meanwhile

    def config_changed(self, changes: Changes) -> None:
        """Requests ask anew by themselves; connections of opaque TCP are asked here, and those that wait for a request
        which this waypoint would only refuse are closed.
        """
        if not changes:
            return
        self._exchanges.config_changed()
        self._connections.reauthorise()
        for client, asked in list(self._waiting.items()):
            try:
                self._destinations.find(asked)
            except RefusedError:
                client.retire()

    def drain(self, grace_s: float) -> None:
        """This process ends: close connections after their next response, or when none is asked for within `grace_s`.

        Whoever has connected or had a response may have sent a request that is not here yet. Callers that speak HTTP/2
        were told, and are waited for less.
        """
        self._exchanges.draining = True
        self._grace_s = grace_s
        for client in list(self._waiting):
            self._leave(client)

    def _leave(self, client: _Client) -> None:
        def retire() -> None:
            if client in self._waiting:
                client.retire()

        client.turn_away()
        told = isinstance(client, Http2Connection)
        self._plane.call_later(min(TOLD_GRACE_S, self._grace_s) if told else self._grace_s, retire)

    @property
    def awaits(self) -> bool:
        """Whether there are connections of callers that may bring a request."""
        return bool(self._waiting)

    def close_idle(self) -> None:
        """The drain time is over: end the connections that wait for a request."""
        for client in list(self._waiting):
            client.close()
        self._exchanges.close()

    def tick(self, now: float) -> None:
        """Called every few seconds."""
        for client in list(self._waiting):
            client.tick(now)

    def _refused(self, record: Connection, error: RefusedError) -> None:
        record.flag, record.error, record.policy = error.flag, str(error), error.policy
        self._telemetry.closed(record, time.monotonic())

    def _record(self, caller: Caller, name: str) -> Connection:
        return Connection(
            direction="waypoint",
            source=caller.peer(self._state),
            destination=Peer("-"),
            request_id=name,
            started=time.monotonic(),
        )


def _taken(carrier: Tunnel, relay: Relay) -> ByteStream:
    """Answer a CONNECT with 200. Raises ConnectionResetError."""
    carrier.respond(relay, ((b":status", b"200"),))
    return ByteStream.of(relay)


async def _detected(stream: ByteStream) -> Begun:
    """Raises OSError, RefusedError."""
    try:
        return await stream.told_by(detection.begun, TIMEOUT_S, TIMEOUT_S) or Begun.OPAQUE
    except TimeoutError:  # it waits for its server to speak first
        return Begun.OPAQUE


async def _introduced(directory: Directory, caller: IpAddress) -> None:
    with contextlib.suppress(RefusedError):  # this proxy shuts down
        await directory.introduce(caller, "")
