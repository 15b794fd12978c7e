"""One connection of opaque TCP through a waypoint: authorise -> pick -> CONNECT -> relay -> record."""

from __future__ import annotations

import time
from collections.abc import Callable

from control.api.address import HBONE_PORT
from uproxy.connections import Connections, Live
from uproxy.errors import Flag, RefusedError
from uproxy.listener import Asked
from uproxy.plane import Plane
from uproxy.relay import CLEAN, Relay
from uproxy.resolve import Hop, host_port
from uproxy.telemetry import Connection, Peer
from uproxy.tunnel import Tunnel
from waypoint.byte_stream import ByteStream
from waypoint.caller import Caller
from waypoint.destination import Destination, Destinations
from waypoint.rules import RuleBook
from waypoint.splice import Splice
from waypoint.telemetry import WaypointTelemetry
from waypoint.upstream import Upstream


class Opaque:
    """Serves connections whose bytes mean nothing here."""

    def __init__(
        self,
        data_plane: Plane,
        destinations: Destinations,
        rules: RuleBook,
        upstream: Upstream,
        connections: Connections,
        telemetry: WaypointTelemetry,
    ) -> None:
        self._plane = data_plane
        self._destinations = destinations
        self._rules = rules
        self._upstream = upstream
        self._connections = connections
        self._telemetry = telemetry

    async def serve(
        self,
        carrier: Tunnel,
        relay: Relay,
        caller: Caller,
        asked: Asked,
        destination: Destination,
        record: Connection,
    ) -> None:
        """Raises RefusedError before the 200, and nothing after it."""

        self._rehearse(caller, destination, record)

        def permitted() -> str:
            try:
                found = self._destinations.find(asked)
            except RefusedError:
                return ""  # the service is no longer served here: what was allowed goes on to its end
            policies = self._rules.at(found).policies
            decision = policies.decide(caller.identity, caller.address, found.address, found.dialled_port, None)
            if decision.allowed:
                return ""
            record.policy = decision.policy
            return decision.reason

        self._authorise(permitted, record)
        hops = (
            (destination.backend,)
            if destination.backend is not None
            else self._destinations.backends(destination.service_key, destination.port)
        )
        backend = await self._reach(caller, hops, record)
        try:
            # What changed during that is told to those in `_connections` alone.
            self._authorise(permitted, record)
        except RefusedError as error:
            backend.abort(str(error))
            raise
        carrier.respond(relay, ((b":status", b"200"),))
        try:
            stream = ByteStream.of(relay)
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

    def _rehearse(self, caller: Caller, destination: Destination, record: Connection) -> None:
        """Tell what policies in dry run would do."""
        policies = self._rules.at(destination).policies
        if policies.rehearsal is not None:
            asked = caller.identity, caller.address, destination.address, destination.dialled_port, None
            record.dry_run = self._telemetry.rehearsals.note(policies.decide(*asked), policies.rehearsal.decide(*asked))

    def _authorise(self, permitted: Callable[[], str], record: Connection) -> None:
        """Raises RefusedError when no policy allows it."""
        refusal = permitted()
        if refusal:
            raise RefusedError("policy", refusal, status=401, flag=Flag.DENY, policy=record.policy)

    async def _reach(self, caller: Caller, hops: tuple[Hop, ...], record: Connection) -> ByteStream:
        """A stream to the first backend that takes it. Raises RefusedError."""
        failed: RefusedError | None = None
        for hop in hops:
            record.destination = Peer(host_port(hop.address, HBONE_PORT), hop.workload)
            try:
                stream = await self._upstream.stream(caller, hop, record)
                record.destination.identity = str(hop.expected)  # the pool proved it
                return stream
            except RefusedError as error:
                failed = error
                if not error.retriable:
                    break
        assert failed is not None  # there is at least one hop
        try:
            raise failed
        finally:
            del failed  # its traceback holds this frame
