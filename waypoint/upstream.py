"""The way to a backend: CONNECT streams that say who calls, and HTTP/1.1 connections that are kept alive over them.

A stream has one caller for life (docs/hbone.md 4): what a caller left idle is used again for the same identity from the
same address, and for nobody else, because the backend's uProxy judged both when the stream was opened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from control.api.address import IpAddress
from control.api.identity import SpiffeId
from uproxy.errors import RefusedError
from uproxy.health import Health
from uproxy.plane import Plane, Waiter
from uproxy.pool import Pool
from uproxy.resolve import Hop, host_port
from waypoint.byte_stream import ByteStream
from waypoint.http1_messages import ResponseEvent
from waypoint.http1_reader import ResponseReader

IDLE_TIMEOUT_S: Final = 55.0
"""Below the 60 s after which many servers close a connection: who closes first loses no request."""
MAX_IDLE_EACH: Final = 64
"""Idle connections of one caller to one backend; more are closed when they are done."""
MAX_IDLE: Final = 4096


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, as the tunnel proved it, and from where."""

    identity: SpiffeId
    address: IpAddress
    port: int


Key = tuple[SpiffeId, IpAddress, IpAddress, SpiffeId, bytes]
"""Who calls and from where; the backend's address, who it must be, and the authority that it was asked for."""


@dataclass(slots=True, eq=False)
class HttpConnection:
    """One HTTP/1.1 connection to a backend."""

    key: Key
    hop: Hop
    stream: ByteStream
    reader: ResponseReader = field(default_factory=ResponseReader)
    used: bool = False
    """Whether it has carried a request: then its server may close it just when the next one comes."""
    idle_since: float = 0.0

    async def events(self, timeout_s: float) -> list[ResponseEvent]:
        """More of the response that is expected, at least one event. Raises MessageError, ConnectionResetError,
        TimeoutError.
        """
        while True:
            data = await self.stream.receive(timeout_s)
            found = self.reader.feed(data) if data else self.reader.eof()
            if found:
                return found


class Cause(Protocol):
    """The request, or connection of opaque TCP, that a stream is opened for."""

    request_id: str

    @property
    def traceparent(self) -> bytes: ...


class Upstream:
    """Opens streams to backends, and keeps idle connections, the one used last on top."""

    def __init__(self, data_plane: Plane, pool: Pool) -> None:
        self._plane = data_plane
        self._pool = pool
        self._idle: dict[Key, list[HttpConnection]] = {}
        self._count = 0

    @property
    def health(self) -> Health:
        """What is known of backends that failed."""
        return self._pool.health

    @property
    def idle(self) -> int:
        """Connections that wait for a request."""
        return self._count

    async def stream(self, caller: Caller, hop: Hop, cause: Cause) -> ByteStream:
        """A CONNECT stream of its own. Raises RefusedError with what the backend's uProxy said."""
        address = host_port(caller.address, caller.port)
        request = [
            (b":method", b"CONNECT"),
            (b":authority", hop.authority),
            (b"x-uproxy-caller", f"{caller.identity};{address}".encode()),
            (b"forwarded", f'for="{address}"'.encode()),
            (b"traceparent", cause.traceparent),
        ]
        relay = await self._pool.connect(hop, request)
        try:
            return ByteStream(relay)
        except ConnectionResetError as error:  # between its 200 and now
            raise RefusedError("connect-failed", f"{hop.address}: {error}", retriable=True) from error

    async def connection(
        self, caller: Caller, hops: Sequence[Hop], cause: Cause, claim: Waiter[HttpConnection], *, fresh: bool
    ) -> None:
        """Settle `claim` with a connection to the first of the hops that answers, or fail it with RefusedError.

        A claim that was given up meanwhile leaves the connection for the next request. `fresh`: one that has carried no
        request.
        """
        failed: RefusedError | None = None
        try:
            for hop in hops:
                try:
                    found = None if fresh else self.kept(caller, hop)
                    found = found or HttpConnection(_key(caller, hop), hop, await self.stream(caller, hop, cause))
                except RefusedError as error:
                    log.info("%s: %s", cause.request_id, error)
                    failed = error
                    if not error.retriable or claim.settled:
                        break
                    continue
                if claim.settled:
                    self.keep(found)
                else:
                    claim.set(found)
                return
        finally:
            # Nothing, if it was settled; whoever waits must learn of a bug, too.
            claim.fail(failed or RefusedError("connect-failed", "a bug of this proxy; its log has the traceback"))
            del failed  # its traceback holds this frame

    def keep(self, connection: HttpConnection) -> None:
        """It can carry another request."""
        kept = self._idle.setdefault(connection.key, [])
        if len(kept) >= MAX_IDLE_EACH or self._count >= MAX_IDLE or not connection.stream.quiet:
            connection.stream.close()
            if not kept:
                del self._idle[connection.key]
            return
        connection.idle_since = time.monotonic()
        connection.stream.on_gone = lambda: self._forget(connection)
        kept.append(connection)
        self._count += 1

    def kept(self, caller: Caller, hop: Hop) -> HttpConnection | None:
        """A connection that waits for a request; it is the caller's from here."""
        kept = self._idle.get(_key(caller, hop), [])
        while kept:
            connection = kept[-1]
            self._forget(connection)
            if connection.stream.quiet:
                return connection
            connection.stream.close()  # its server has said something unasked, mostly that it closes
        return None

    def _forget(self, connection: HttpConnection) -> None:
        connection.stream.on_gone = _nothing
        kept = self._idle.get(connection.key, [])
        if connection in kept:
            kept.remove(connection)
            self._count -= 1
            if not kept:
                del self._idle[connection.key]

    def tick(self, now: float) -> None:
        """Called every few seconds: close what was idle for long, or what its server has closed."""
        for kept in list(self._idle.values()):
            for connection in list(kept):
                if now - connection.idle_since > IDLE_TIMEOUT_S or not connection.stream.quiet:
                    self._forget(connection)
                    connection.stream.close()

    def close(self) -> None:
        """Close every idle connection."""
        for kept in list(self._idle.values()):
            for connection in list(kept):
                self._forget(connection)
                connection.stream.close()


def _key(caller: Caller, hop: Hop) -> Key:
    return caller.identity, caller.address, hop.address, hop.expected, hop.authority


def _nothing() -> None: ...
