"""What a CONNECT asks a waypoint for: a port of a service that it serves, or of a workload; HTTP, or opaque TCP."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

from control.api.address import AddressError, IpAddress, parse_address
from control.api.gateway import Gateway, Placement
from control.api.workload import OPAQUE_PORTS, Endpoint, Service, ServicePort
from control.client.state import State
from uproxy.errors import Flag, RefusedError
from uproxy.health import Health
from uproxy.listener import Asked
from uproxy.resolve import Hop, Resolver, host_port
from waypoint.balancers import Balancers
from waypoint.balancing import Host
from waypoint.caller import Caller
from waypoint.request import Request
from waypoint.turn import Hops

_NOWHERE: Final = IpAddress("0.0.0.0")


@dataclass(frozen=True, slots=True)
class Destination:
    """One port that callers may ask for."""

    address: IpAddress
    dialled_port: int
    services: tuple[Service, ...]
    """Whose policies hold, in order; the first is the one that is reported. Several where a workload's own address was
    dialled and several of the services here select it; none for a workload that is bound by itself."""
    port: int
    """Of the first service; of the workload when there is none."""
    http: bool
    undeclared: bool
    """Whether nothing says what it speaks: HTTP is what begins as such, and backends are spoken to as callers speak."""
    http2: bool
    """Whether `backend` takes requests by HTTP/2."""
    backend: Hop | None
    """The workload whose own address was dialled: nothing is left to choose. None: routes and weights choose."""

    @property
    def service_key(self) -> str:
        return self.services[0].key if self.services else ""


class Destinations:
    """Those of one Gateway, by what callers ask for. Worked out once per configuration."""

    def __init__(self, state: State, gateway: str, health: Health | None = None, own: str = "") -> None:
        """`gateway`: key of the Gateway. `health`: what is known of backends; those that failed come last.

        `own`: key of this process's workload, if it has one, whose node and account say what it serves, if not all.
        """
        self._state = state
        self._gateway = gateway
        self._own = own
        known = health if health is not None else Health(lambda: 0.0)
        self._resolver = Resolver(state, random.Random(), known, self.preferred, caller=own)
        self.balancers = Balancers(state, gateway, own, self._resolver, known)
        self._generation = -1
        # The services' workloads, by their own addresses; None until somebody dials one.
        self._behind: dict[tuple[IpAddress, int], Destination] | None = None
        self._found: dict[tuple[str, int], Destination] = {}
        # Of the services' ports that were asked for; None: nothing says so.
        self._http2: dict[tuple[str, int], bool | None] = {}

    def find(self, asked: Asked) -> Destination:
        """Raises RefusedError: 400 `wrong-destination` for what this waypoint does not serve."""
        self._refresh()
        place = (asked.host, asked.port)
        found = self._found.get(place)
        if found is None:
            found = self._find(asked)
            if len(self._found) >= 4096:  # a peer may spell one address in many ways
                self._found.clear()
            self._found[place] = found
        return found

    def all(self) -> Iterator[Destination]:
        """Those that can be told beforehand: ports of services, and of the workloads behind them."""
        self._refresh()
        gateway = self._state.gateway(self._gateway)
        if gateway is None:
            return
        for service in filter(None, map(self._state.service, gateway.services)):
            for port in service.ports:
                yield from (_destination(address, port.port, service, port, None) for address in service.vips)
        yield from self._workloads_of(gateway).values()

    def _refresh(self) -> None:
        if self._generation != self._state.generation:
            self._generation = self._state.generation
            self._found.clear()
            self._http2.clear()
            self._behind = None

    def dialled(self, address: IpAddress, port: int, name: str) -> Asked:
        """As `Gateway.dialled`."""
        gateway, service = self._state.gateway(self._gateway), self._state.service_named(name) if name else None
        # Nobody asks for a headless service, but for its workloads.
        if gateway is not None and service is not None and service.vips and service.key in gateway.services:
            for endpoint in self._state.endpoints(service.key):
                if endpoint.workload == self._own:
                    for service_port, target in endpoint.ports.items():
                        if target == port and address == endpoint.address:
                            return Asked(f"{service.hostname}:{service_port}", service.hostname, service_port)
        return Asked(host_port(address, port), address, port)

    def unknown(self, asked: Asked) -> IpAddress | None:
        """The address that was dialled, if it may be a bound workload's and nothing is known of it yet."""
        gateway = self._state.gateway(self._gateway)
        if gateway is None or not gateway.workloads:
            return None
        try:
            address = parse_address(asked.host)
        except AddressError:
            return None
        known = self._state.covers(address) or self._state.service_at(address, asked.port) is not None
        return None if known else address

    def backends(self, service_key: str, port: int) -> tuple[Hop, ...]:
        """Where a request for a service port may go, best first. Raises RefusedError when nobody is there."""
        service = self._state.service(service_key)
        if service is None:
            raise RefusedError("no-endpoint", f"there is no service {service_key}")
        return self._resolver.backends(service, port)

    def hops(
        self,
        service_key: str,
        port: int,
        caller: Caller,
        request: Request | None,
        *,
        grpc: bool = False,
        tried: Sequence[Host] = (),
    ) -> Hops:
        """Likewise for one attempt, as is said of how that service is balanced; `tried`: by attempts before.

        `request`: None of opaque TCP. Whoever gets a Turn leaves it. Raises RefusedError when nobody is there.
        """
        turn = self.balancers.turn(service_key, port, caller, request, tried, grpc=grpc)
        return turn if turn is not None else self.backends(service_key, port)

    def preferred(self, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        """Those that this process stands before; where there are none, which routes may lead to, all of them."""
        gateway, own = self._state.gateway(self._gateway), self._state.workload(self._own)
        if own is None or gateway is None or gateway.placement is Placement.REMOTE:
            return endpoints
        if gateway.placement is Placement.SIDECAR:
            return [one for one in endpoints if one.workload == own.key]
        of_account = gateway.placement is Placement.SERVICE_ACCOUNT
        served = [one for one in endpoints if one.node == own.node and (one.identity == own.identity or not of_account)]
        return served or endpoints

    def are_left(self, destination: Destination) -> bool:
        """Whether callers go to its services in another way now, by the present configuration."""
        gateway, own = self._state.gateway(self._gateway), self._state.workload(self._own)
        if gateway is not None and gateway.placement is Placement.SIDECAR:
            return own is None or own.sidecar is None or not own.sidecar.ports
        return any(
            service.binding is None or not service.binding.leads_to(self._gateway) for service in destination.services
        )

    def speaks_http2(self, service_key: str, port: int, caller: bool) -> bool:
        """Whether the workloads of a service port take requests by HTTP/2; as the caller does, if nothing says so."""
        self._refresh()
        place = (service_key, port)
        try:
            speaks = self._http2[place]
        except KeyError:
            service = self._state.service(service_key)
            found = [one for one in service.ports if one.port == port] if service is not None else []
            undeclared = any(one.is_undeclared for one in found)
            speaks = self._http2[place] = None if undeclared else any(one.is_http2 for one in found)
        return caller if speaks is None else speaks

    def _find(self, asked: Asked) -> Destination:
        gateway = self._state.gateway(self._gateway)
        if gateway is None:
            raise RefusedError("no-config", f"Gateway {self._gateway} is not known here", flag=Flag.NO_CONFIG)
        try:
            address = parse_address(asked.host)
        except AddressError:
            service = self._state.service_named(asked.host)
            address = service.vips[0] if service is not None and service.vips else _NOWHERE
        found = self._state.service_at(address, asked.port)
        if found is not None and found[0].key in gateway.services:
            service, port = found
            return _destination(address, asked.port, service, port, None)
        behind = self._workloads_of(gateway).get((address, asked.port))
        if behind is not None:
            return behind
        workload = self._state.workload_at(address)
        if workload is not None and workload.key in gateway.workloads:
            straight = Hop(address, workload.identity, host_port(address, asked.port).encode(), workload)
            undeclared = asked.port not in OPAQUE_PORTS
            return Destination(address, asked.port, (), asked.port, False, undeclared, False, straight)
        awaited = [service_key for service_key in gateway.services if self._state.service(service_key) is None]
        if awaited:  # it may be one of these: another process of the waypoint may know it
            raise RefusedError("no-config", f"{asked.authority}: {awaited[0]} has not come yet", flag=Flag.NO_CONFIG)
        raise RefusedError(
            "wrong-destination",
            f"{asked.authority} is nothing that Gateway {self._gateway} serves: is the label "
            "istio.io/use-waypoint of its service or workload meant for another one?",
            status=400,
            flag=Flag.DENY,
        )

    def _workloads_of(self, gateway: Gateway) -> dict[tuple[IpAddress, int], Destination]:
        """What is behind the services, as destinations of their own."""
        if self._behind is None:
            self._behind = {}
            for service_key in gateway.services:
                service = self._state.service(service_key)
                if service is not None:
                    for endpoint in self._state.endpoints(service_key):
                        self._add_endpoint(self._behind, service, endpoint)
        return self._behind

    def _add_endpoint(
        self, behind: dict[tuple[IpAddress, int], Destination], service: Service, endpoint: Endpoint
    ) -> None:
        workload = self._state.workload(endpoint.workload) or endpoint.as_workload()
        addresses = dict.fromkeys((endpoint.address, *workload.addresses))
        for address, port in product(addresses, service.ports):
            target = endpoint.ports.get(port.port)
            if target is None:
                continue
            place = address, target
            other = behind.get(place)
            if other is None:
                authority = host_port(address, target).encode()
                straight = Hop(address, endpoint.identity, authority, workload)
                behind[place] = _destination(*place, service, port, straight)
            else:
                # What one service refuses is refused: of HTTP more can be asked.
                http = port.is_http or other.http
                undeclared = not http and (port.is_undeclared or other.undeclared)
                services = (*other.services, service)
                behind[place] = replace(other, services=services, http=http, undeclared=undeclared)


def _destination(
    address: IpAddress, dialled_port: int, service: Service, port: ServicePort, backend: Hop | None
) -> Destination:
    undeclared = port.is_undeclared
    return Destination(address, dialled_port, (service,), port.port, port.is_http, undeclared, port.is_http2, backend)
