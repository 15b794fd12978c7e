"""One outbound connection's life, top to bottom: from the application to the peer's uProxy.

accept -> where was it going? -> plan, after asking the control plane for what is not known -> a CONNECT stream, to an
endpoint or to the waypoint before it (to another one if the first fails before any byte was sent) -> relay both ways ->
one access-log record.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from control.api.address import HBONE_PORT, IpAddress
from control.api.index import ResidentWorkload
from control.client.state import Changes, State
from uproxy import plane
from uproxy.connections import Connections, Live
from uproxy.errors import Flag, RefusedError
from uproxy.header_block import Headers
from uproxy.health import RetryBudget
from uproxy.plain_relay import HANDED_OVER, PlainRelay
from uproxy.plane import Plane, Waiter
from uproxy.pool import Pool
from uproxy.redirect import OriginalDestination, Route
from uproxy.relay import CLEAN, Relay
from uproxy.resolve import Hop, Plan, Resolver, host_port
from uproxy.telemetry import Connection, Peer, Telemetry

if TYPE_CHECKING:
    from uproxy.demand import Demand
    from uproxy.direct import DirectPath

# One deadline over all endpoints that are tried for a connection.
OPEN_TIMEOUT_S = 20.0
# How long a connection waits for the configuration that names its waypoint, when somebody else says that it has one.
BINDING_PATIENCE_S = 5.0
MAX_ONCE_BOUND = 4096

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
        direct_path: DirectPath | None = None,
    ) -> None:
        """`demand`: where what is not known is asked for; None when there is nobody to ask. `direct_path`: likewise,
        who is told of what tunnels have reached.
        """
        self.pool = pool
        self.probed: Callable[[tuple[str, int]], None] | None = None
        self._plane = data_plane
        self._state = state
        self._connections = connections
        self._telemetry = telemetry
        self._own = own
        self._demand = demand
        self._direct_path = direct_path
        self._resolver = Resolver(state, random.Random(), pool.health, caller=own.key)
        self._budget = RetryBudget(time.monotonic)
        self._once_bound: dict[str, None] = {}
        """What this process has seen bound to a waypoint, by key or address; the oldest comes first."""
        self._waiting: set[Waiter[None]] = set()  # for another configuration

    async def serve_captured(
        self, ask_kernel: Callable[[socket.socket], OriginalDestination], app: socket.socket
    ) -> None:
        """A connection that capture brought here: the kernel knows where it was going."""
        try:
            destination = ask_kernel(app)
        except RefusedError as error:
            self._refuse(app, self._record(app, "-"), error)
            return
        if destination.route is Route.PROBE:
            self._answer_probe(app)
            return
        await self.serve(app, destination)

    async def serve(self, app: socket.socket, destination: OriginalDestination, *, traced: bool = True) -> None:
        """A connection whose destination is known, from here to its end. Never raises.

        `traced`: it may be recorded as a span, which what carries spans is not.
        """
        plane.reset_on_close(app)
        record = self._record(app, host_port(destination.address, destination.port))
        if traced and self._telemetry.spans is not None and self._telemetry.spans.draws():
            record.span = record.request_id[:16]
        try:
            plan = await self._plan(destination)
            record.destination_service = plan.service.key if plan.service is not None else ""
            relay, hop = await self._open(plan, record)
        except RefusedError as error:
            self._refuse(app, record, error)
            return
        record.destination.identity = str(hop.expected)  # the pool proved it
        await relay_and_record(app, relay, record, self._connections, self._telemetry, None)

    async def _plan(self, destination: OriginalDestination) -> Plan:
        """The kernel's word and our configuration: the stricter wins. Raises RefusedError."""
        plan = await self._configured(destination.address, destination.port, destination.drawn)
        if plan.gateway:
            self._note_bound(plan.service.key if plan.service is not None else plan.address)
        elif destination.route is Route.WAYPOINT and not self._is_unbound(plan):
            through = await self._through_waypoint(plan, ((destination.address, destination.port),))
            if through is None:
                raise RefusedError(
                    "no-config",
                    f"{host_port(plan.address, plan.port)} is reached through a waypoint, says the kernel, and this "
                    f"uProxy's configuration named none within {BINDING_PATIENCE_S:g} s",
                    flag=Flag.NO_CONFIG,
                )
            return through
        return plan

    async def _configured(self, address: IpAddress, port: int, drawn: int = 0) -> Plan:
        """Raises RefusedError when the mesh does not know the destination, or has no endpoint for it."""
        if self._demand is None:
            return self._resolver.plan(address, port, drawn)
        try:
            plan: Plan | None = self._resolver.plan(address, port, drawn)
        except RefusedError:
            plan = None
        if plan is None or (plan.gateway and self._state.gateway(plan.gateway) is None):
            found = self._state.service_at(address, port)
            # A known service may lack endpoints, or its waypoint, because they have not come yet.
            await (self._demand.service(found[0].key) if found is not None else self._demand.destination(address))
            plan = self._resolver.plan(address, port, drawn)
        if plan.service is not None:
            self._demand.used.add(plan.service.key)
        return plan

    def _is_unbound(self, plan: Plan) -> bool:
        """Whether our configuration knows that this goes directly, although the kernel said otherwise.

        It does when it has seen the binding go: then the kernel's word is the older one. And the kernel speaks of all
        ports of a workload, of which some may be bound.
        """
        if plan.service is not None:
            return plan.service.key in self._once_bound
        resident = self._state.resident_at(plan.address)
        return plan.address in self._once_bound or (isinstance(resident, ResidentWorkload) and bool(resident.bindings))

    def _note_bound(self, one: str) -> None:
        if one not in self._once_bound:
            if len(self._once_bound) >= MAX_ONCE_BOUND:
                del self._once_bound[next(iter(self._once_bound))]
            self._once_bound[one] = None

    async def _through_waypoint(self, plan: Plan, ways: Sequence[tuple[IpAddress, int]]) -> Plan | None:
        """A plan through the waypoint of one of these destinations, as soon as the configuration has one; None: never.

        Raises RefusedError when the destination is bound and its waypoint cannot be used.
        """
        deadline = time.monotonic() + BINDING_PATIENCE_S
        while True:
            changed: Waiter[None] = Waiter(self._plane)
            self._waiting.add(changed)  # before anything is looked up: looking up may take time
            try:
                for address, port in ways:
                    through = await self._bound(address, port)
                    if through is not None:
                        return replace(through, service=plan.service)
                await self._plane.wait(changed, deadline - time.monotonic())
            except TimeoutError:
                return None
            finally:
                self._waiting.discard(changed)

    async def _bound(self, address: IpAddress, port: int) -> Plan | None:
        """The plan for a destination if it is known and bound. Raises RefusedError when its waypoint cannot be used."""
        try:
            plan = await self._configured(address, port)
        except RefusedError as error:
            if error.flag is not Flag.NO_CONFIG:
                raise
            return None
        return plan if plan.gateway else None

    def config_changed(self, changes: Changes) -> None:
        for key in changes.services:
            service = self._state.service(key)
            if service is not None and service.binding is not None:
                self._note_bound(key)
        for waiter in self._waiting:
            waiter.set(None)

    async def _open(self, plan: Plan, record: Connection) -> tuple[Relay, Hop]:
        """A CONNECT stream that was answered with 200, on the first endpoint that gives one (docs/hbone.md 4)."""
        headers = _headers(plan, record)
        deadline = time.monotonic() + OPEN_TIMEOUT_S
        failed: RefusedError | None = None
        last = plan.hops[0]
        self._budget.tried()
        for hop in plan.hops:
            if failed is not None and not self._budget.allows():
                break
            last = hop
            record.destination = Peer(host_port(hop.address, HBONE_PORT), hop.workload)
            record.hbone_address = hop.authority.decode()
            try:
                request = ((b":method", b"CONNECT"), (b":authority", hop.authority), *headers)
                relay = await self.pool.connect(hop, request)
                if self._direct_path is not None and not plan.gateway:
                    self._direct_path.reached(plan, hop)
                return relay, hop
            except RefusedError as error:
                failed = error
                log.info("%s: %s", record.request_id, error)
                if not error.retriable or time.monotonic() > deadline:
                    break
        assert failed is not None  # a plan has at least one hop
        try:
            if failed.flag is Flag.WAYPOINT and not plan.gateway:
                port = int(last.authority.rpartition(b":")[2])
                # What was dialled is bound, or another service that has the same endpoint.
                through = await self._through_waypoint(plan, ((plan.address, plan.port), (last.address, port)))
                if through is not None:
                    return await self._open(through, record)
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
    relay: Relay | PlainRelay,
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
    if outcome is HANDED_OVER:
        telemetry.handed_over(record)
        return
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
        (b"traceparent", record.traceparent),
    )
