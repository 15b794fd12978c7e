"""Who calls through a waypoint."""

from __future__ import annotations

from dataclasses import replace

from control.api.address import IpAddress
from control.api.identity import SpiffeId
from control.api.workload import Workload
from control.client.state import State
from uproxy.resolve import Hop, host_port
from uproxy.telemetry import Peer

Key = tuple[SpiffeId, IpAddress, IpAddress, SpiffeId, bytes, bool]
"""Who calls and from where; the backend's address, who it must be, the authority that it was asked for; HTTP/2?"""


class Caller:
    """Who calls, as the tunnel proved it, and from where. What is told of that with each request is made once."""

    __slots__ = ("_generation", "_peer", "address", "certificate", "identity", "port")

    def __init__(self, identity: SpiffeId, address: IpAddress, port: int) -> None:
        self.identity = identity
        self.address = address
        self.port = port
        self.certificate = f"URI={identity}".encode()
        """As x-forwarded-client-cert says it."""
        self._peer = Peer(host_port(address, port), None, str(identity))
        self._generation = -1

    def peer(self, state: State) -> Peer:
        """As records name the caller: as a workload, if there is one with that identity at that address."""
        if self._generation != state.generation:
            self._generation = state.generation
            workload: Workload | None = state.workload_at(self.address)
            known = workload if workload is not None and workload.identity == self.identity else None
            self._peer = replace(self._peer, workload=known)
        return self._peer

    def key(self, hop: Hop, *, http2: bool) -> Key:
        """What a connection to a backend is kept under: it is for one caller as long as it lives (docs/hbone.md 4)."""
        return self.identity, self.address, hop.address, hop.expected, hop.authority, http2
