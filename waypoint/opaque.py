"""One connection of opaque TCP through a waypoint: authorise -> pick -> CONNECT -> relay -> record."""

from __future__ import annotations

import time
from collections.abc import Callable

from control.api.address import HBONE_PORT
from uproxy.connections import Connections, Live
from uproxy.errors import Flag, RefusedError
from uproxy.listener import Asked
from uproxy.plane import Plane
from uproxy.relay import CLEAN
from uproxy.resolve import host_port
from uproxy.telemetry import Connection, Peer
from waypoint.byte_stream import ByteStream
from waypoint.caller import Caller
from waypoint.connection_limits import PENDING_TIMEOUT_S, Limiter, Limiters
from waypoint.destination import Destination, Destinations
from waypoint.rules import RuleBook
from waypoint.splice import Splice
from waypoint.telemetry import WaypointTelemetry
from waypoint.turn import Hops, Turn
from waypoint.upstream import Upstream


class Opaque:
    """Serves connections whose bytes mean nothing here."""

    def __init__(
        self,
        data_plane: Plane,
        destinations: Destinations,
        rules: RuleBook,
        upstream: Upstream,
        limiters: Limiters,
        connections: Connections,
        telemetry: WaypointTelemetry,
    ) -> None:
        self._plane = data_plane
        self._destinations = destinations
        self._rules = rules
        self._upstream = upstream
        self._limiters = limiters
        self._connections = connections
        self._telemetry = telemetry

    async def serve(
        self,
        take: Callable[[], ByteStream],
        caller: Caller,
        asked: Asked,
        destination: Destination,
        record: Connection,
    ) -> None:
        """`take` is called for the caller's stream when the backend's is there; raises ConnectionResetError.

        Raises RefusedError before that, and nothing after it.
        """

        self._note(caller, destination, record)

        def permitted() -> str:
            try:
                found = self._destinations.find(asked)
            except RefusedError:
                return ""  # the service is no longer served here: what was allowed goes on to its end
            rules = self._rules.at(found)
            if found.undeclared and rules.asks_http:
                return "something asks for what HTTP says, and this is none; declare the port's appProtocol"
            policies = rules.policies
            decision = policies.decide(caller.identity, caller.address, found.address, found.dialled_port, None)
            if decision.allowed:
                return ""
            record.policy = decision.policy
            return decision.reason

        self._authorise(permitted, record)
        hops: Hops = (
            (destination.backend,)
            if destination.backend is not None
            else self._destinations.hops(destination.service_key, destination.port, caller, None)
        )
        try:
            await self._serve_by(hops, take, caller, destination, permitted, record)
        finally:
            if isinstance(hops, Turn):
                hops.leave()

    async def _serve_by(
        self,
        hops: Hops,
        take: Callable[[], ByteStream],
        caller: Caller,
        destination: Destination,
        permitted: Callable[[], str],
        record: Connection,
    ) -> None:
        """As `serve`."""
        limiter = self._limiters.at(destination.service_key)
        if limiter is not None:
            await self._room(limiter)
        try:
            backend = await self._reach(caller, hops, record)
        except RefusedError:
            if limiter is not None:
                limiter.release()
            raise
        if limiter is not None:
            backend.on_over = limiter.release
        try:
            # What changed during that is told to those in `_connections` alone.
            self._authorise(permitted, record)
        except RefusedError as error:
            backend.abort(str(error))
            raise
        try:
            stream = take()
        except ConnectionResetError as error:
            backend.abort(str(error))
            record.flag, record.error = Flag.RESET, str(error)
            self._telemetry.closed(record, time.monotonic())
            return
        splice = Splice(self._plane, stream, backend)
        live = Live(splice, record, lambda: f"policy: no longer allowed: {why}" if (why := permitted()) else "")
        record.meter = splice
        self._telemetry.opened(record)
        self._connections.add(live)
        try:
            outcome = await splice.done
        except RefusedError as error:  # this proxy shuts down
            splice.cut(str(error))
            outcome = await splice.done
        self._connections.remove(live)
        if outcome is not CLEAN:
            record.flag, record.error = outcome.flag, outcome.text
        self._telemetry.closed(record, time.monotonic())

    def _note(self, caller: Caller, destination: Destination, record: Connection) -> None:
        """Tell what AUDIT policies match, and what policies in dry run would do."""
        policies = self._rules.at(destination).policies
        asked = caller.identity, caller.address, destination.address, destination.dialled_port, None
        decision = policies.decide(*asked)
        record.audit = decision.audit
        if policies.rehearsal is not None:
            record.dry_run = self._telemetry.rehearsals.note(decision, policies.rehearsal.decide(*asked))

    def _authorise(self, permitted: Callable[[], str], record: Connection) -> None:
        """Raises RefusedError when no policy allows it."""
        refusal = permitted()
        if refusal:
            raise RefusedError("policy", refusal, status=401, flag=Flag.DENY, policy=record.policy)

    async def _room(self, limiter: Limiter) -> None:
        """Wait until another connection may be opened, which is counted then. Raises RefusedError."""
        waited = False
        deadline = time.monotonic() + PENDING_TIMEOUT_S
        while not limiter.take(waited=waited):
            claim = limiter.line_up(waited=waited)
            if claim is None:
                raise RefusedError("overload", "too many connections to the service wait for another to end")
            waited = True
            try:
                await self._plane.wait(claim, max(deadline - time.monotonic(), 0.0))
            except TimeoutError:
                raise RefusedError("overload", "no other connection to the service has ended in time") from None

    async def _reach(self, caller: Caller, hops: Hops, record: Connection) -> ByteStream:
        """A stream to the first backend that takes it. Raises RefusedError."""
        failed: RefusedError | None = None
        for hop in hops:
            record.destination = Peer(host_port(hop.address, HBONE_PORT), hop.workload)
            try:
                stream = await self._upstream.stream(caller, hop, record)
                record.destination.identity = str(hop.expected)  # the pool proved it
                if isinstance(hops, Turn):
                    hops.answered(200)
                return stream
            except RefusedError as error:
                failed = error
                if not error.retriable:
                    break
        assert failed is not None  # there is at least one hop
        if isinstance(hops, Turn) and failed.retriable:
            hops.unanswered(late=False)
        try:
            raise failed
        finally:
            del failed  # its traceback holds this frame
