"""The way to a backend: streams of one caller each, and HTTP connections that are kept alive over them.

A stream has one caller for life (docs/hbone.md 4): what a caller left idle is used again for the same identity from the
same address, and for nobody else, because the backend's uProxy judged both when the stream was opened.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from copy import copy
from typing import Final

from control.api.address import IpAddress
from uproxy.errors import RefusedError
from uproxy.health import Health
from uproxy.plane import Plane, Waiter
from uproxy.resolve import Hop
from waypoint.byte_stream import ByteStream
from waypoint.caller import Caller, Key
from waypoint.connection_limits import Limiter
from waypoint.http1_outgoing import Http1Outgoing
from waypoint.http2_connection import Http2Connection
from waypoint.http2_outgoing import Http2Outgoing
from waypoint.sides import Outgoing
from waypoint.ways import Cause, Way

IDLE_TIMEOUT_S: Final = 55.0
"""Below the 60 s after which many servers close a connection: who closes first loses no request."""
MAX_IDLE_EACH: Final = 64
"""Idle connections of one caller to one backend; more are closed when they are done."""
MAX_IDLE: Final = 4096

log = logging.getLogger(__name__)


class Upstream:
    """Opens streams to backends, and keeps idle connections, the one used last on top."""

    def __init__(self, data_plane: Plane, way: Way) -> None:
        self._plane = data_plane
        self._way = way
        self._idle: dict[Key, list[Http1Outgoing]] = {}
        self._count = 0
        self._shared: dict[Key, dict[Http2Connection, Limiter | None]] = {}
        self._opening: dict[Key, list[Waiter[None]]] = {}

    @property
    def health(self) -> Health:
        """What is known of backends that failed."""
        return self._way.health

    def source(self, peer: IpAddress) -> IpAddress | None:
        """This process's own address that a peer sees; None: the host chooses one."""
        return self._way.source(peer)

    @property
    def idle(self) -> int:
        """Connections that wait for a request."""
        return self._count + sum(one.quiet for shared in self._shared.values() for one in shared)

    async def stream(self, caller: Caller, hop: Hop, cause: Cause) -> ByteStream:
        """A stream of its own. Raises RefusedError with what the backend's uProxy, or the backend, said."""
        return await self._way.stream(caller, hop, cause)

    async def outgoing(
        self,
        caller: Caller,
        hops: Iterable[Hop],
        cause: Cause,
        claim: Waiter[Outgoing],
        *,
        http2: bool,
        fresh: bool,
        limiter: Limiter | None = None,
    ) -> None:
        """Settle `claim` with a way to the first of the hops that answers, or fail it with RefusedError.

        A claim that was given up meanwhile leaves the connection for the next request. `fresh`: on a connection that
        has carried no request. `limiter` has counted the one that may be opened.
        """
        failed: RefusedError | None = None
        unopened = limiter
        try:
            for hop in hops:
                try:
                    found = None if fresh else self.kept(caller, hop, http2=http2)
                    if found is None:
                        open_ = self._share if http2 else self._dial
                        found = await open_(caller, hop, cause, limiter)
                        unopened = None
                except RefusedError as error:
                    log.info("%s: %s", cause.request_id, error)
                    failed = error
                    if not error.retriable or claim.settled:
                        break
                    continue
                if claim.settled:
                    found.done(uploaded=True)
                else:
                    claim.set(found)
                return
        finally:
            if unopened is not None:
                unopened.release()
            # Nothing, if it was settled; whoever waits must learn of a bug, too.
            claim.fail(failed or RefusedError("connect-failed", "a bug of this proxy; its log has the traceback"))
            del failed  # its traceback holds this frame

    def kept(self, caller: Caller, hop: Hop, *, http2: bool) -> Outgoing | None:
        """A connection that waits for a request, or can take another one beside those that it carries."""
        if not self._way.admits(caller, hop):
            return None
        key = caller.key(hop, http2=http2)
        if http2:
            for shared, limiter in self._shared.get(key, {}).items():
                if shared.usable:
                    return Http2Outgoing(shared, hop, limiter, fresh=False)
            return None
        kept = self._idle.get(key)
        while kept:
            connection = kept.pop()
            self._released(connection)
            if not kept:
                del self._idle[key]
            if connection.quiet:
                return connection
            connection.close()  # its server has said something unasked, mostly that it closes
        return None

    # -- HTTP/2: a connection carries many requests of one caller at once

    async def _share(self, caller: Caller, hop: Hop, cause: Cause, limiter: Limiter | None) -> Outgoing:
        """A new connection; of requests that come at once, one opens it for all. Raises RefusedError."""
        key = caller.key(hop, http2=True)
        while (opening := self._opening.get(key)) is not None:
            waiter: Waiter[None] = Waiter(self._plane)
            opening.append(waiter)
            await waiter
            found = self.kept(caller, hop, http2=True)
            if found is not None:
                if limiter is not None:
                    limiter.release()
                return found
        waiting = self._opening[key] = []
        failed: RefusedError | None = None
        try:
            stream = await self.stream(caller, hop, cause)
            try:
                connection = Http2Connection(stream, lambda gone: self._gone(key, gone, limiter), IDLE_TIMEOUT_S)
            except ConnectionResetError as error:
                raise RefusedError("connect-failed", f"{hop.address}: {error}", retriable=True) from error
            if connection.closed:
                raise RefusedError("connect-failed", f"{hop.address}: broke HTTP/2 at once", retriable=True)
            self._shared.setdefault(key, {})[connection] = limiter
            if limiter is not None:
                limiter.shared[connection] = 0
                limiter.go_on()  # who waits may be of this caller
            return Http2Outgoing(connection, hop, limiter, fresh=True)
        except RefusedError as error:
            failed = error
            raise
        finally:
            del self._opening[key]
            for waiter in waiting:
                if failed is None:
                    waiter.set(None)
                else:
                    waiter.fail(copy(failed))
            del failed  # its traceback holds this frame

    def _gone(self, key: Key, connection: Http2Connection, limiter: Limiter | None) -> None:
        shared = self._shared.get(key, {})
        if connection in shared:
            del shared[connection]
            if not shared:
                del self._shared[key]
            if limiter is not None:
                del limiter.shared[connection]
                limiter.release()

    # -- HTTP/1.1: a connection carries one request at a time

    async def _dial(self, caller: Caller, hop: Hop, cause: Cause, limiter: Limiter | None) -> Outgoing:
        """Raises RefusedError."""
        stream = await self.stream(caller, hop, cause)
        if limiter is not None:
            stream.on_over = limiter.release
        return Http1Outgoing(caller.key(hop, http2=False), hop, stream, self._keep, limiter)

    def _keep(self, connection: Http1Outgoing) -> None:
        """It can carry another request."""
        kept = self._idle.setdefault(connection.key, [])
        if len(kept) >= MAX_IDLE_EACH or self._count >= MAX_IDLE or not connection.quiet:
            connection.close()
            if not kept:
                del self._idle[connection.key]
            return
        connection.idle_since = time.monotonic()
        connection.on_gone = lambda: self._forget(connection)
        kept.append(connection)
        self._count += 1
        if connection.limiter is not None:
            connection.limiter.idle[connection] = lambda: self._drop(connection)
            connection.limiter.go_on()

    def _drop(self, connection: Http1Outgoing) -> None:
        self._forget(connection)
        connection.close()

    def _forget(self, connection: Http1Outgoing) -> None:
        kept = self._idle.get(connection.key, [])
        if connection in kept:
            kept.remove(connection)
            self._released(connection)
            if not kept:
                del self._idle[connection.key]

    def _released(self, connection: Http1Outgoing) -> None:
        """It is idle no longer."""
        self._count -= 1
        connection.on_gone = _nothing
        if connection.limiter is not None:
            connection.limiter.idle.pop(connection, None)

    # -- the end

    def tick(self, now: float) -> None:
        """Called every few seconds: close what was idle for long, or what its server has closed."""
        for kept in list(self._idle.values()):
            for connection in list(kept):
                if now - connection.idle_since > IDLE_TIMEOUT_S or not connection.quiet:
                    self._drop(connection)
        for shared in list(self._shared.values()):
            for one in list(shared):
                one.tick(now)

    def close(self) -> None:
        """Close every connection; requests that are under way are lost."""
        for kept in list(self._idle.values()):
            for connection in list(kept):
                self._drop(connection)
        for shared in list(self._shared.values()):
            for one in list(shared):
                one.close()


def _nothing() -> None: ...
