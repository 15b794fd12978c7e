"""How the endpoints of each service port are balanced, as TrafficPolicies say it, and what that asks of a request."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from control.api.balancing import ConsistentHash, HashOf, LoadBalancing, OutlierDetection
from control.api.workload import Service
from control.client.state import State
from uproxy.health import Health
from uproxy.resolve import Hop, Resolver
from waypoint.balancing import AT_RANDOM, Balancer, Host
from waypoint.caller import Caller
from waypoint.hash_ring import position
from waypoint.request import Request
from waypoint.routing import parameters
from waypoint.turn import Turn

log = logging.getLogger(__name__)


class Balancers:
    """Those of one waypoint. What they know of endpoints outlives changes of everything else."""

    def __init__(
        self,
        state: State,
        gateway: str,
        own: str,
        resolver: Resolver,
        health: Health,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`gateway`: key of the Gateway. `own`: key of this process's workload; empty: it has none.

        `clock` gives monotonic seconds.
        """
        self.ejections = 0
        """So far."""
        self._state = state
        self._gateway = gateway
        self._own = own
        self._resolver = resolver
        self._health = health
        self._clock = clock
        self._generation = -1
        self._current: dict[tuple[str, int], Balancer | None] = {}
        """Of this generation; None: nothing is said of that service."""
        self._kept: dict[tuple[str, int], Balancer] = {}

    def ejected(self) -> list[dict[str, object]]:
        """Endpoints that are left alone now, for operators."""
        now = self._clock()
        return [
            {
                "service": service,
                "port": port,
                "endpoint": host.hop.authority.decode(),
                "for_s": round(host.record.until - now, 1),
            }
            for (service, port), balancer in self._kept.items()
            for host in balancer.ejected(now)
        ]

    def turn(
        self, service: str, port: int, caller: Caller, request: Request | None, tried: Sequence[Host], *, grpc: bool
    ) -> Turn | None:
        """Where an attempt goes that is for a service (its key); None: nothing is said of how it is balanced.

        `tried`: by attempts before. Raises RefusedError when nobody is there.
        """
        if self._generation != self._state.generation:
            self._generation = self._state.generation
            self._current.clear()
            self._kept = {place: one for place, one in self._kept.items() if self._state.service(place[0]) is not None}
        place = (service, port)
        if place in self._current:
            balancer = self._current[place]
        else:
            balancer = self._current[place] = self._configured(service, port)
        if balancer is None:
            return None
        where, cookie = (None, b"") if balancer.hash is None else _looked_for(balancer.hash, caller, request)
        return Turn(balancer, self._health, self._clock, where, cookie, grpc=grpc, tried=tried)

    def _configured(self, service_key: str, port: int) -> Balancer | None:
        """Raises RefusedError."""
        service = self._state.service(service_key)
        said, detection = said_of(self._state, self._gateway, service) if service is not None else (None, None)
        if service is None or (said is None and detection is None):
            self._kept.pop((service_key, port), None)
            return None
        endpoints = self._resolver.weighed(service, port)
        balancer = self._kept.get((service_key, port))
        if balancer is None:
            balancer = self._kept[service_key, port] = Balancer(random.Random(), self._note)
        own = self._state.workload(self._own)
        balancer.configure(said, detection, own.locality if own is not None else "", endpoints, self._clock())
        return balancer

    def _note(self, hop: Hop, why: str) -> None:
        self.ejections += 1
        log.warning("endpoint %s (%s): %s", hop.workload.key if hop.workload else "-", hop.authority.decode(), why)


def said_of(state: State, gateway: str, service: Service) -> tuple[LoadBalancing | None, OutlierDetection | None]:
    """What is said of a service stands above what is said of the Gateway; of several, the first by name."""
    policies = (*state.traffic_targeting("Service", service.key), *state.traffic_targeting("Gateway", gateway))
    said = next((policy.load_balancing for policy in policies if policy.load_balancing is not None), None)
    detection = next((policy.outlier_detection for policy in policies if policy.outlier_detection is not None), None)
    if service.prefers_zone and (said is not None or detection is not None):
        said = replace(said if said is not None else AT_RANDOM, local=True)
    return said, detection


def _looked_for(said: ConsistentHash, caller: Caller, request: Request | None) -> tuple[int | None, bytes]:
    """Where on the ring, if the request says it, and the cookie to be set. `request`: None of opaque TCP."""
    text: str | None = None
    match said.of:
        case HashOf.ADDRESS:
            text = caller.address
        case HashOf.IDENTITY:
            text = str(caller.identity)
        case HashOf.HEADER if request is not None:
            text = request.header(said.name)
        case HashOf.PARAMETER if request is not None:
            text = parameters(request.query).get(said.name)
        case HashOf.COOKIE if request is not None:
            text = _cookie(request, said.name)
            if text is None and said.ttl_ms is not None:
                text = os.urandom(16).hex()
                return position(text.encode()), _set_cookie(said, text)
    return None if text is None else position(text.encode()), b""


def _cookie(request: Request, name: str) -> str | None:
    """The first of this name."""
    # HTTP/2 may send one in several lines (RFC 9113 section 8.2.3), which are joined by commas here.
    for pair in (request.header("cookie") or "").replace(",", ";").split(";"):
        its, equals, value = pair.strip().partition("=")
        if equals and its == name:
            return value
    return None


def _set_cookie(said: ConsistentHash, value: str) -> bytes:
    lasts = f"; Max-Age={said.ttl_ms // 1000}" if said.ttl_ms else ""
    path = f"; Path={said.path}" if said.path else ""
    return f"{said.name}={value}{lasts}{path}; HttpOnly".encode()
