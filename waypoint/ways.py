"""How a stream gets to a backend: through a tunnel to its uProxy, or straight to the workload that is beside."""

from __future__ import annotations

from typing import Protocol

from control.api.address import IpAddress
from control.api.workload import Workload
from control.client.state import State
from uproxy import application
from uproxy.authz import Decision, compile_policies
from uproxy.errors import Flag, RefusedError
from uproxy.health import Health
from uproxy.plane import Plane
from uproxy.pool import Pool
from uproxy.resolve import Hop, host_port
from waypoint.byte_stream import ByteStream
from waypoint.caller import Caller
from waypoint.line import Line


class Cause(Protocol):
    """The request, or connection of opaque TCP, that a stream is opened for."""

    request_id: str

    @property
    def traceparent(self) -> bytes: ...


class Way(Protocol):
    """Opens streams to backends."""

    @property
    def health(self) -> Health:
        """What is known of backends that failed."""

    def source(self, peer: IpAddress) -> IpAddress | None:
        """This process's own address that a peer sees; None: the host chooses one."""

    def admits(self, caller: Caller, hop: Hop) -> bool:
        """Whether this caller's streams that are kept may be used for more requests."""

    async def stream(self, caller: Caller, hop: Hop, cause: Cause) -> ByteStream:
        """One of its own. Raises RefusedError."""


class Tunnels:
    """CONNECT streams, which say who calls."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @property
    def health(self) -> Health:
        return self._pool.health

    def source(self, peer: IpAddress) -> IpAddress | None:
        return self._pool.source(peer)

    def admits(self, caller: Caller, hop: Hop) -> bool:
        """The backend's uProxy cuts those that policy no longer allows."""
        return True

    async def stream(self, caller: Caller, hop: Hop, cause: Cause) -> ByteStream:
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
            return ByteStream.of(relay)
        except ConnectionResetError as error:  # between its 200 and now
            raise RefusedError("connect-failed", f"{hop.address}: {error}", retriable=True) from error


class Beside:
    """Connections to the one workload that this process stands beside.

    Its uProxy has judged who comes to the port that was dialled. A route may lead to another one, before which no
    uProxy stands here: so the workload's own policies are asked again.
    """

    def __init__(self, data_plane: Plane, state: State, own: str, health: Health) -> None:
        """`own`: key of the workload."""
        self._plane = data_plane
        self._state = state
        self._own = own
        self.health = health
        self._generation = -1
        self._policies = compile_policies(())

    def source(self, peer: IpAddress) -> IpAddress | None:
        return None

    def admits(self, caller: Caller, hop: Hop) -> bool:
        own = self._state.workload(self._own)
        return own is not None and self._decide(caller, hop, own).allowed

    def _decide(self, caller: Caller, hop: Hop, own: Workload) -> Decision:
        if self._generation != self._state.generation:
            self._generation = self._state.generation
            self._policies = compile_policies(self._state.policies_for(own))
        return self._policies.decide(caller.identity, caller.address, hop.address, _port(hop))

    async def stream(self, caller: Caller, hop: Hop, cause: Cause) -> ByteStream:
        own = self._state.workload(self._own)
        if own is None or hop.address not in own.addresses:
            detail = f"{hop.address} is not {self._own}, beside which this process stands"
            raise RefusedError("wrong-destination", detail)
        port = _port(hop)
        decision = self._decide(caller, hop, own)
        if not decision.allowed:
            raise RefusedError("policy", decision.reason, status=401, flag=Flag.DENY, policy=decision.policy)
        app, _ = await application.dial(self._plane, hop.address, port)
        if port in own.proxy_protocol:
            application.tell(app, (caller.address, caller.port), caller.identity, (hop.address, port))
        return Line(self._plane, app).open()


def _port(hop: Hop) -> int:
    """The workload's."""
    return int(hop.authority.rpartition(b":")[2])
