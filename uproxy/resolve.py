"""Where a connection goes: (state, destination) to a plan that answers every routing question at once. No I/O."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from control.api.address import IpAddress
from control.api.gateway import Binding, Gateway, Instance, Placement, Via
from control.api.identity import SpiffeId
from control.api.index import ResidentWorkload
from control.api.locality import zone_distance
from control.api.workload import Endpoint, Service, Workload
from control.client.state import State
from uproxy.errors import Flag, RefusedError
from uproxy.health import Health

# One connection is tried on at most this many endpoints (docs/hbone.md 4: "at most two more").
MAX_HOPS = 3
# An endpoint's weight is shared out among the processes before it in whole parts; ten and fewer divide this.
_PARTS = 2520


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
    """Key of the waypoint to whose processes the first hops lead; empty: straight to the destination."""


@dataclass(frozen=True, slots=True)
class _Group:
    """The ready endpoints of one service port, and their weights added up in order."""

    hops: tuple[Hop, ...]
    cumulative: tuple[int, ...]

    @property
    def weights(self) -> tuple[int, ...]:
        return tuple(last - first for first, last in zip((0, *self.cumulative), self.cumulative, strict=False))


class Resolver:
    """Plans connections from one state. What a service port resolves to is worked out once per generation."""

    def __init__(
        self,
        state: State,
        rng: random.Random,
        health: Health | None = None,
        preferred: Callable[[Sequence[Endpoint]], Sequence[Endpoint]] | None = None,
        caller: str = "",
    ) -> None:
        """`health`: what is known of endpoints; those that failed a moment ago come last. `preferred`: which endpoints
        of a service are taken, of those that are ready; None: all. `caller`: key of the workload that goes there, by
        which a canary is chosen, and whose zone is the nearest.
        """
        self._state = state
        self._preferred = preferred
        self._caller = caller
        self._rng = rng
        self._health = health if health is not None else Health(lambda: 0.0)
        self._generation = -1
        self._groups: dict[tuple[str, int], tuple[_Group, ...]] = {}
        """Those that are nearest first, where a service prefers these; else there is one."""
        self._by_id: dict[tuple[str, int], dict[int, Hop]] = {}
        self._before: dict[tuple[str, str, int], tuple[_Group, ...]] = {}

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
        gateway_key = binding.gateway
        hops = self._instances(gateway_key, binding.node, direct)
        if binding.canary and binding.takes_canary(self._caller):
            canary = self._instances(binding.canary, binding.node, direct)
            if canary:
                gateway_key, hops = binding.canary, self._healthy_first((*canary[: MAX_HOPS - 1], *hops))[:MAX_HOPS]
        if binding.via is Via.PREFERRED:
            hops = (*hops[: MAX_HOPS - 1], *self._straight(direct))[:MAX_HOPS]
        if not hops:
            gateway = self._state.gateway(binding.gateway)
            raise RefusedError(
                "no-waypoint",
                f"{destination} is bound to waypoint {binding.gateway}, "
                + ("which is not known here" if gateway is None else f"of which {_none_runs(gateway)}"),
            )
        return replace(direct, hops=hops, gateway=gateway_key)

    def _healthy_first(self, hops: tuple[Hop, ...]) -> tuple[Hop, ...]:
        return tuple(sorted(hops, key=lambda hop: self._health.is_bad(hop.address))) if self._health else hops

    def _instances(self, gateway_key: str, node: str, direct: Plan) -> tuple[Hop, ...]:
        """Processes of a waypoint that serve the destination, in random order, at most MAX_HOPS."""
        gateway = self._state.gateway(gateway_key)
        if gateway is None:
            return ()
        authority = _authority(direct.address, direct.port)
        if gateway.placement is Placement.REMOTE:
            serving = gateway.instances
        elif direct.service is not None:
            return self._before_endpoints(gateway, direct.service, direct.port, authority)
        else:
            serving = gateway.before(node, direct.hops[0].expected.service_account)
        wanted = len(serving) if self._health else min(len(serving), MAX_HOPS)
        instances = self._rng.sample(serving, wanted)
        if self._health:
            instances.sort(key=lambda instance: self._health.is_bad(instance.address))
        return tuple(self._hop_to(gateway, instance, authority) for instance in instances[:MAX_HOPS])

    def _hop_to(self, gateway: Gateway, instance: Instance, authority: bytes) -> Hop:
        expected = gateway.identity_of(self._state.trust_domain, instance)
        return Hop(instance.address, expected, authority, self._state.workload_at(instance.address))

    def _before_endpoints(self, gateway: Gateway, service: Service, port: int, authority: bytes) -> tuple[Hop, ...]:
        """The processes before a service's endpoints, drawn with the weights of these."""
        self._refresh()
        groups = self._before.get((gateway.key, service.key, port))
        if groups is None:
            found: list[_Group] = []
            nearer: set[Instance] = set()
            for endpoints in self._by_distance(service, self._ready(service, port)):
                weights: dict[Instance, int] = {}
                for endpoint in endpoints:
                    serving = gateway.before(endpoint.node, endpoint.identity.service_account)
                    for one in serving:
                        weights[one] = weights.get(one, 0) + endpoint.weight * _PARTS // len(serving)
                weights = {one: weight for one, weight in weights.items() if one not in nearer}
                nearer |= weights.keys()
                if weights:
                    hops = tuple(self._hop_to(gateway, one, b"") for one in weights)
                    found.append(_Group(hops, tuple(accumulate(weights.values()))))
            groups = self._before[gateway.key, service.key, port] = tuple(found)
        return tuple(replace(hop, authority=authority) for hop in self._draw_of(groups))

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
        return self._draw_of(self._groups_of(service, port))

    def weighed(self, service: Service, port: int) -> tuple[tuple[Hop, int], ...]:
        """All ready endpoints of a service port, each with its weight. Raises RefusedError when there is none."""
        groups = self._groups_of(service, port)
        return tuple(pair for group in groups for pair in zip(group.hops, group.weights, strict=True))

    def _first(self, drawn: int, service: Service, port: int, hops: tuple[Hop, ...]) -> tuple[Hop, ...]:
        """With the kernel's draw before the others, unless it failed a moment ago or is none of ours.

        What the kernel draws here it takes itself. Without this, this host would have the other draws' share too.
        """
        by_id = self._by_id.get((service.key, port))
        if by_id is None:
            nearest = self._groups_of(service, port)[0].hops
            by_id = {backend_id(hop.address, int(hop.authority.rpartition(b":")[2])): hop for hop in nearest}
            self._by_id[service.key, port] = by_id
        hop = by_id.get(drawn)
        if hop is None or self._is_bad(hop):
            return hops
        return (hop, *(other for other in hops if other is not hop))[:MAX_HOPS]

    def _is_bad(self, hop: Hop) -> bool:
        return self._health.is_bad(hop.authority) or self._health.is_bad(hop.address)

    def _refresh(self) -> None:
        if self._generation != self._state.generation:
            self._generation = self._state.generation
            self._groups.clear()
            self._by_id.clear()
            self._before.clear()

    def _ready(self, service: Service, port: int) -> list[Endpoint]:
        return [e for e in self._state.endpoints(service.key) if e.ready and e.weight > 0 and port in e.ports]

    def _by_distance(self, service: Service, endpoints: Sequence[Endpoint]) -> Sequence[Sequence[Endpoint]]:
        """The nearest first, where the service says so."""
        own = self._state.workload(self._caller) if service.prefers_zone else None
        if own is None:
            return (endpoints,)
        found: dict[int, list[Endpoint]] = {}
        for endpoint in endpoints:
            found.setdefault(zone_distance(own.locality, endpoint.locality), []).append(endpoint)
        return [found[distance] for distance in sorted(found)]

    def _groups_of(self, service: Service, port: int) -> tuple[_Group, ...]:
        """At least one. Raises RefusedError."""
        self._refresh()
        groups = self._groups.get((service.key, port))
        if groups is None:
            ready: Sequence[Endpoint] = self._ready(service, port)
            if self._preferred is not None:
                ready = self._preferred(ready)
            groups = self._groups[service.key, port] = tuple(
                self._group(endpoints, port) for endpoints in self._by_distance(service, ready) if endpoints
            )
        if not groups:
            raise RefusedError("no-endpoint", f"service {service.key} has no ready endpoint for port {port}")
        return groups

    def _group(self, endpoints: Sequence[Endpoint], port: int) -> _Group:
        hops = tuple(
            Hop(
                endpoint.address,
                endpoint.identity,
                _authority(endpoint.address, endpoint.ports[port]),
                self._state.workload(endpoint.workload) or endpoint.as_workload(),
            )
            for endpoint in endpoints
        )
        return _Group(hops, tuple(accumulate(endpoint.weight for endpoint in endpoints)))

    def _draw_of(self, groups: Sequence[_Group]) -> tuple[Hop, ...]:
        """At most MAX_HOPS, of the first group and then of the next ones; of all groups those last that failed a moment
        ago.
        """
        if self._health:
            groups = self._groups_by_health(groups)
        drawn: tuple[Hop, ...] = ()
        for group in groups:
            drawn += self._draw(group)
            if len(drawn) >= MAX_HOPS:
                break
        return drawn[:MAX_HOPS]

    def _groups_by_health(self, groups: Sequence[_Group]) -> Sequence[_Group]:
        found: tuple[list[_Group], list[_Group]] = ([], [])
        for group in groups:
            parts: tuple[list[tuple[Hop, int]], list[tuple[Hop, int]]] = ([], [])
            for hop, weight in zip(group.hops, group.weights, strict=True):
                parts[self._is_bad(hop)].append((hop, weight))
            for bad, part in enumerate(parts):
                if part:
                    found[bad].append(_Group(tuple(hop for hop, _ in part), tuple(accumulate(w for _, w in part))))
        return (*found[False], *found[True])

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


def _none_runs(gateway: Gateway) -> str:
    if gateway.placement is Placement.REMOTE:
        return "no process runs"
    return f"no process serves it (placement {gateway.placement.value})"


def backend_id(address: IpAddress, port: int) -> int:
    """What the kernel calls an endpoint: 32 bits, not 0."""
    return int.from_bytes(hashlib.sha256(f"{address} {port}".encode()).digest()[:4], "big") or 1


def _authority(address: IpAddress, port: int) -> bytes:
    return host_port(address, port).encode()


def host_port(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
