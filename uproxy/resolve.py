"""Where a connection goes: (state, destination) to a plan that answers every routing question at once. No I/O."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate

from control.api.address import IpAddress
from control.api.gateway import Binding, Via, gateway_identity
from control.api.identity import SpiffeId
from control.api.index import ResidentWorkload
from control.api.workload import Service, Workload
from control.client.state import State
from uproxy.errors import Flag, RefusedError
from uproxy.health import Health

# One connection is tried on at most this many endpoints (docs/hbone.md 4: "at most two more").
MAX_HOPS = 3


@dataclass(frozen=True, slots=True)
class Hop:
    """One way to go: the peer's uProxy, who it must be, and what it is asked for (docs/hbone.md 2.3)."""

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
    gateway: str = ""
    """Key of the waypoint to whose processes the hops lead; empty: straight to the destination."""


@dataclass(frozen=True, slots=True)
class _Group:
    """The ready endpoints of one service port, and their weights added up in order."""

    hops: tuple[Hop, ...]
    cumulative: tuple[int, ...]


class Resolver:
    """Plans connections from one state. What a service port resolves to is worked out once per generation."""

    def __init__(self, state: State, rng: random.Random, health: Health | None = None) -> None:
        """`health`: what is known of endpoints; those that failed a moment ago come last."""
        self._state = state
        self._rng = rng
        self._health = health if health is not None else Health(lambda: 0.0)
        self._generation = -1
        self._groups: dict[tuple[str, int], _Group] = {}
        self._by_id: dict[tuple[str, int], dict[int, Hop]] = {}

    def plan(self, address: IpAddress, port: int, drawn: int = 0) -> Plan:
        """Decide for one destination. Raises RefusedError when the mesh does not know it or has no endpoint for it.

        `drawn`: the endpoint that the kernel has drawn (`backend_id`), 0 if none.
        """
        state = self._state
        if not state.whole:
            raise RefusedError("no-config", "this uProxy has no configuration yet", flag=Flag.NO_CONFIG)
        found = state.service_at(address, port)
        if found is not None:
            service, _ = found
            if service.binding is not None:
                return self._through(service.binding, Plan(address, port, service, ()))
            hops = self.backends(service, port)
            return Plan(address, port, service, self._first(drawn, service, port, hops) if drawn else hops)
        workload = state.workload_at(address)
        if workload is None:
            raise RefusedError(
                "no-config",
                f"{host_port(address, port)} lies in the mesh, but no service port or workload has this address",
                flag=Flag.NO_CONFIG,
            )
        direct = Plan(address, port, None, (Hop(address, workload.identity, _authority(address, port), workload),))
        resident = state.resident_at(address)
        if isinstance(resident, ResidentWorkload) and resident.bindings:  # few have any: this is on everybody's path
            binding = resident.binding_at(port)
            return direct if binding is None else self._through(binding, direct)
        return direct

    def _through(self, binding: Binding, direct: Plan) -> Plan:
        """The plan for something that is bound; `direct` is how it would go otherwise, as far as that is known."""
        destination = direct.service.key if direct.service is not None else host_port(direct.address, direct.port)
        if binding.via is Via.REFUSE:
            raise RefusedError(
                "waypoint-not-ready",
                f"{destination} is bound to waypoint {binding.gateway}, which has never been ready, and an L7 policy "
                "must not be missed: start it",
            )
        hops = self._instances(binding.gateway, _authority(direct.address, direct.port))
        if binding.via is Via.PREFERRED:
            hops = (*hops[: MAX_HOPS - 1], *self._straight(direct))[:MAX_HOPS]
        if not hops:
            raise RefusedError(
                "no-waypoint",
                f"{destination} is bound to waypoint {binding.gateway}, "
                + ("of which no process runs" if self._state.gateway(binding.gateway) else "which is not known here"),
            )
        return replace(direct, hops=hops, gateway=binding.gateway)

    def _instances(self, gateway_key: str, authority: bytes) -> tuple[Hop, ...]:
        """Processes of a waypoint in random order, at most MAX_HOPS."""
        gateway = self._state.gateway(gateway_key)
        if gateway is None:
            return ()
        expected = gateway_identity(self._state.trust_domain, gateway_key)
        wanted = len(gateway.instances) if self._health else min(len(gateway.instances), MAX_HOPS)
        instances = self._rng.sample(gateway.instances, wanted)
        if self._health:
            instances.sort(key=lambda instance: self._health.is_bad(instance.address))
        return tuple(
            Hop(instance.address, expected, authority, self._state.workload_at(instance.address))
            for instance in instances[:MAX_HOPS]
        )

    def _straight(self, direct: Plan) -> tuple[Hop, ...]:
        if direct.service is None:
            return direct.hops
        try:
            return self.backends(direct.service, direct.port)
        except RefusedError:
            return ()

    def backends(self, service: Service, port: int) -> tuple[Hop, ...]:
        """Ready endpoints of a service port in random order by weight, at most MAX_HOPS: straight to each, whatever the
        service is bound to. Raises RefusedError when there is none.
        """
        group = self._group(service, port)
        return self._draw_healthy(group) if self._health else self._draw(group)

    def _first(self, drawn: int, service: Service, port: int, hops: tuple[Hop, ...]) -> tuple[Hop, ...]:
        """With the kernel's draw before the others, unless it failed a moment ago or is none of ours.

        What the kernel draws here it takes itself. Without this, this host would have the other draws' share too.
        """
        by_id = self._by_id.get((service.key, port))
        if by_id is None:
            group = self._group(service, port)
            by_id = {backend_id(hop.address, int(hop.authority.rpartition(b":")[2])): hop for hop in group.hops}
            self._by_id[service.key, port] = by_id
        hop = by_id.get(drawn)
        if hop is None or self._is_bad(hop):
            return hops
        return (hop, *(other for other in hops if other is not hop))[:MAX_HOPS]

    def _is_bad(self, hop: Hop) -> bool:
        return self._health.is_bad(hop.authority) or self._health.is_bad(hop.address)

    def _group(self, service: Service, port: int) -> _Group:
        if self._generation != self._state.generation:
            self._generation = self._state.generation
            self._groups.clear()
            self._by_id.clear()
        group = self._groups.get((service.key, port))
        if group is None:
            ready = [e for e in self._state.endpoints(service.key) if e.ready and e.weight > 0 and port in e.ports]
            hops = tuple(
                Hop(
                    endpoint.address,
                    endpoint.identity,
                    _authority(endpoint.address, endpoint.ports[port]),
                    self._state.workload(endpoint.workload) or endpoint.as_workload(),
                )
                for endpoint in ready
            )
            group = _Group(hops, tuple(accumulate(e.weight for e in ready)))
            self._groups[service.key, port] = group
        if not group.hops:
            raise RefusedError("no-endpoint", f"service {service.key} has no ready endpoint for port {port}")
        return group

    def _draw_healthy(self, group: _Group) -> tuple[Hop, ...]:
        """As `_draw`, with those that failed a moment ago behind the others."""
        weights = [last - first for first, last in zip((0, *group.cumulative), group.cumulative, strict=False)]
        parts: tuple[list[tuple[Hop, int]], list[tuple[Hop, int]]] = ([], [])
        for hop, weight in zip(group.hops, weights, strict=True):
            parts[self._is_bad(hop)].append((hop, weight))
        drawn: tuple[Hop, ...] = ()
        for part in parts:
            if part:
                drawn += self._draw(_Group(tuple(hop for hop, _ in part), tuple(accumulate(w for _, w in part))))
        return drawn[:MAX_HOPS]

    def _draw(self, group: _Group) -> tuple[Hop, ...]:
        """Different endpoints, each drawn with its weight; when the draws keep meeting, the next ones in order."""
        hops, wanted = group.hops, min(len(group.hops), MAX_HOPS)
        if len(hops) == 1:
            return hops
        drawn: dict[int, None] = {}
        for _ in range(2 * wanted):
            drawn[bisect_right(group.cumulative, self._rng.random() * group.cumulative[-1])] = None
            if len(drawn) == wanted:
                break
        first = next(iter(drawn))
        for step in range(1, len(hops)):
            if len(drawn) == wanted:
                break
            drawn[(first + step) % len(hops)] = None
        return tuple(hops[index] for index in drawn)


def backend_id(address: IpAddress, port: int) -> int:
    """What the kernel calls an endpoint: 32 bits, not 0."""
    return int.from_bytes(hashlib.sha256(f"{address} {port}".encode()).digest()[:4], "big") or 1


def _authority(address: IpAddress, port: int) -> bytes:
    return host_port(address, port).encode()


def host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
