"""One outbound connection's life, top to bottom: from the application to the peer's uProxy.

accept -> where was it going? -> plan, after asking the control plane for what is not known -> a CONNECT stream (on
another endpoint if the first fails before any byte was sent) -> relay both ways -> one access-log record.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from control.api.address import IpAddress
from control.client.state import State
from uproxy import plane
from uproxy.connections import Connections, Live
from uproxy.errors import RefusedError
from uproxy.header_block import Headers
from uproxy.plane import Plane
from uproxy.pool import Pool
from uproxy.redirect import OriginalDestination, Route, original_destination
from uproxy.relay import CLEAN, Relay
from uproxy.resolve import Hop, Plan, Resolver, host_port
from uproxy.telemetry import Connection, Peer, Telemetry
from uproxy.tunnel import HBONE_PORT

if TYPE_CHECKING:
    from uproxy.demand import Demand

# One deadline over all endpoints that are tried for a connection.
OPEN_TIMEOUT_S = 20.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Self:
    """The workload that this process acts for, as it is configured; `record` is what the mesh knows of it."""

    key: str
    identity: str
    trust_domain: str
    addresses: tuple[IpAddress, ...]

    @property
    def namespace(self) -> str:
        return self.key.partition("/")[0]


class Outbound:
    """Connections from this workload into the mesh."""

    def __init__(
        self,
        data_plane: Plane,
        state: State,
        pool: Pool,
        connections: Connections,
        telemetry: Telemetry,
        own: Self,
        demand: Demand | None = None,
    ) -> None:
        """`demand`: where what is not known is asked for; None when there is nobody to ask."""
        self.pool = pool
        self.probed: Callable[[tuple[str, int]], None] | None = None
        self._plane = data_plane
        self._state = state
        self._connections = connections
        self._telemetry = telemetry
        self._own = own
        self._demand = demand
        self._resolver = Resolver(state, random.Random())

    async def serve_captured(self, app: socket.socket) -> None:
        """A connection that eBPF brought here: the kernel knows where it was going."""
        try:
            destination = original_destination(app)
        except RefusedError as error:
            self._refuse(app, self._record(app, "-"), error)
            return
        if destination.route is Route.PROBE:
            self._answer_probe(app)
            return
        await self.serve(app, destination)

    async def serve(self, app: socket.socket, destination: OriginalDestination) -> None:
        """A connection whose destination is known, from here to its end. Never raises."""
        plane.reset_on_close(app)
        record = self._record(app, host_port(destination.address, destination.port))
        try:
            plan = await self._plan(destination.address, destination.port)
            record.destination_service = plan.service.key if plan.service is not None else ""
            relay, hop = await self._open(plan, record)
        except RefusedError as error:
            self._refuse(app, record, error)
            return
        record.destination.identity = str(hop.expected)  # the pool proved it
        await relay_and_record(app, relay, record, self._connections, self._telemetry, None)

    async def _plan(self, address: IpAddress, port: int) -> Plan:
        """Raises RefusedError when the mesh does not know the destination, or has no endpoint for it."""
        if self._demand is None:
            return self._resolver.plan(address, port)
        try:
            plan: Plan | None = self._resolver.plan(address, port)
        except RefusedError:
            plan = None
        if plan is None:
            found = self._state.service_at(address, port)
            # A known service may lack endpoints because they have not come yet.
            await (self._demand.service(found[0].key) if found is not None else self._demand.destination(address))
            plan = self._resolver.plan(address, port)
        if plan.service is not None:
            self._demand.used.add(plan.service.key)
        return plan

    async def _open(self, plan: Plan, record: Connection) -> tuple[Relay, Hop]:
        """A CONNECT stream that was answered with 200, on the first endpoint that gives one (docs/hbone.md 4)."""
        headers = _headers(plan, record)
        deadline = time.monotonic() + OPEN_TIMEOUT_S
        failed: RefusedError | None = None
        for hop in plan.hops:
            record.destination = Peer(host_port(hop.address, HBONE_PORT), hop.workload)
            record.hbone_address = hop.authority.decode()
            try:
                request = ((b":method", b"CONNECT"), (b":authority", hop.authority), *headers)
                return await self.pool.connect(hop, request), hop
            except RefusedError as error:
                failed = error
                log.info("%s: %s", record.request_id, error)
                if not error.retriable or time.monotonic() > deadline:
                    break
        assert failed is not None  # a plan has at least one hop
        try:
            raise failed
        finally:
            del failed  # its traceback holds this frame

    def _record(self, app: socket.socket, destination: str) -> Connection:
        try:
            port = app.getpeername()[1]
        except OSError:
            port = 0  # it is gone already
        own = self._state.workload(self._own.key)
        return Connection(
            direction="outbound",
            source=Peer(host_port(self._own.addresses[0], port), own, self._own.identity),
            destination=Peer(destination, None, ""),
            request_id=os.urandom(16).hex(),
            started=time.monotonic(),
        )

    def _refuse(self, app: socket.socket, record: Connection, error: RefusedError) -> None:
        """When all fail, the application gets RST, never FIN: nothing must look like an empty answer."""
        plane.reset(app)
        fail(record, error, self._telemetry)

    def _answer_probe(self, app: socket.socket) -> None:
        """This process dialled itself through capture (see run.py): tell it that the connection arrived."""
        with contextlib.suppress(OSError):
            if self.probed is not None:
                self.probed(app.getpeername()[:2])
        app.close()


def fail(record: Connection, error: RefusedError, telemetry: Telemetry) -> None:
    """Record a connection that was never relayed."""
    record.flag = error.flag
    record.error = str(error)
    record.policy = error.policy
    telemetry.closed(record, time.monotonic())


async def relay_and_record(
    app: socket.socket,
    relay: Relay,
    record: Connection,
    connections: Connections,
    telemetry: Telemetry,
    permitted: Callable[[], str] | None,
) -> None:
    """The middle and the end of a connection's life, the same in both directions."""
    live = Live(relay, record, permitted)
    record.meter = relay
    telemetry.opened(record)
    connections.add(live)
    relay.attach(app)
    outcome = await relay.done
    connections.remove(live)
    if outcome is not CLEAN:
        record.flag = outcome.flag
        record.error = outcome.text
    telemetry.closed(record, time.monotonic())


def _headers(plan: Plan, record: Connection) -> Headers:
    """ztunnel's extra headers (docs/hbone.md 2.3), which no receiver may require."""
    forwarded = f'for="{record.source.address}"'
    if plan.service is not None:
        forwarded += f";host={plan.service.hostname}"
    return (
        (b"forwarded", forwarded.encode()),
        (b"traceparent", f"00-{record.request_id}-{record.request_id[:16]}-00".encode()),
    )
