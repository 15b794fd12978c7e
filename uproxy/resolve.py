"""Where a connection goes: (state, destination) to a plan that answers every routing question at once. No I/O."""

from __future__ import annotations

import random
from dataclasses import dataclass

from control.api.address import IpAddress
from control.api.identity import SpiffeId
from control.api.workload import Service, Workload
from control.client.state import State
from uproxy.errors import Flag, RefusedError

# One connection is tried on at most this many endpoints (HBONE.md section 4: "at most two more").
MAX_HOPS = 3


@dataclass(frozen=True, slots=True)
class Hop:
    """One way to go: the peer's uProxy, who it must be, and what it is asked for (HBONE.md 2.3)."""

    address: IpAddress
    expected: SpiffeId
    authority: bytes
    workload: Workload | None


@dataclass(frozen=True, slots=True)
class Plan:
    """Where one connection goes. `hops` are tried in order, until one answers."""

    address: IpAddress
    port: int
    service: Service | None
    hops: tuple[Hop, ...]


def plan(state: State, address: IpAddress, port: int, rng: random.Random) -> Plan:
    """Decide for one destination. Raises RefusedError when the mesh does not know it or has no endpoint for it."""
    if not state.whole:
        raise RefusedError("no-config", "this uProxy has no configuration yet", flag=Flag.NO_CONFIG)
    found = state.service_at(address, port)
    if found is not None:
        service, _ = found
        return Plan(address, port, service, _service_hops(state, service, port, rng))
    workload = state.workload_at(address)
    if workload is None:
        raise RefusedError(
            "no-config",
            f"{_authority(address, port)} is in the mesh's ranges, but no service port or workload has this address",
            flag=Flag.NO_CONFIG,
        )
    hop = Hop(address, workload.identity, _authority(address, port).encode(), workload)
    return Plan(address, port, None, (hop,))


def _service_hops(state: State, service: Service, port: int, rng: random.Random) -> tuple[Hop, ...]:
    """Some ready endpoints in random order, each drawn with its weight."""
    endpoints = [e for e in state.endpoints(service.key) if e.ready and e.weight > 0 and port in e.ports]
    if not endpoints:
        raise RefusedError(
            "no-endpoint", f"service {service.key} has no ready endpoint for port {port}", flag=Flag.CONNECT
        )
    hops: list[Hop] = []
    while endpoints and len(hops) < MAX_HOPS:
        (endpoint,) = rng.choices(endpoints, [e.weight for e in endpoints]) if len(endpoints) > 1 else endpoints
        endpoints.remove(endpoint)
        authority = _authority(endpoint.address, endpoint.ports[port]).encode()
        hops.append(Hop(endpoint.address, endpoint.identity, authority, state.workload(endpoint.workload)))
    return tuple(hops)


def _authority(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
