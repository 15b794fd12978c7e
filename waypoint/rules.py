"""What holds at one destination of a waypoint: its routes and policies, compiled from the state."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Final

from control.api.address import IpAddress
from control.api.extension import Filter
from control.api.jwt import RequestAuthentication
from control.api.policy import AuthorizationPolicy, Target
from control.api.route import HTTPRoute
from control.api.traffic import TrafficPolicy
from control.client.state import State
from waypoint import websocket
from waypoint.authz import Policies, compile_policies
from waypoint.destination import Destination
from waypoint.routing import Router, compile_routes
from waypoint.tokens import Tokens
from waypoint.traffic import Ledger, Traffic

MAX_KEPT: Final = 4096
"""Destinations whose rules are kept: a workload that is bound by itself has as many as there are ports."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Never change; made by `rules_at` for one generation of the state."""

    router: Router
    policies: Policies
    tokens: Tokens
    traffic: Traffic
    trusted_proxies: int
    """As the Gateway says."""
    asks_http: bool
    """Whether anything here asks for what HTTP says: then what is not HTTP must not pass where nobody has said so."""
    upgrades: frozenset[bytes]
    """To which protocols requests may upgrade."""
    filters: tuple[Filter, ...]
    """In the order in which requests come to them."""


@dataclass(frozen=True, slots=True)
class Held:
    """The resources that hold at one destination: those of its Gateway and of its services."""

    policies: tuple[AuthorizationPolicy, ...]
    routes: tuple[HTTPRoute, ...]
    """Of the first service, which alone may have some."""
    traffic: tuple[TrafficPolicy, ...]
    """In the order of their keys."""
    authentications: tuple[RequestAuthentication, ...]
    trusted_proxies: int
    """As the Gateway says."""

    @property
    def asks_http(self) -> bool:
        """As `Rules.asks_http`."""
        return (
            bool(self.routes or self.authentications)
            or any(policy.asks_http and not policy.dry_run for policy in self.policies)
            or any(one.rate_limits or one.max_requests or one.faults or one.filters for one in self.traffic)
        )


def held_at(state: State, gateway: str, destination: Destination) -> Held:
    """`gateway`: key of the waypoint's Gateway."""
    keys = tuple(service.key for service in destination.services)
    targets = (Target("Gateway", gateway), *(Target("Service", key) for key in keys))
    policies = {p.key: p for target in targets for p in state.policies_targeting(target.kind, target.key)}
    traffic = {one.key: one for t in targets for one in state.traffic_targeting(t.kind, t.key)}
    authentications = {one.key: one for t in targets for one in state.authentications_targeting(t.kind, t.key)}
    own = state.gateway(gateway)
    return Held(
        policies=tuple(policies.values()),
        routes=state.routes_for(destination.service_key) if keys else (),
        traffic=tuple(traffic[its] for its in sorted(traffic)),
        authentications=tuple(authentications.values()),
        trusted_proxies=own.trusted_proxies if own is not None else 0,
    )


def rules_at(state: State, gateway: str, destination: Destination, ledger: Ledger) -> Rules:
    """`gateway`: key of the waypoint's Gateway. TrafficPolicies count in the ledger."""
    held = held_at(state, gateway, destination)
    return Rules(
        compile_routes(held.routes, destination.service_key, destination.port),
        compile_policies(held.policies, held.trusted_proxies),
        Tokens(held.authentications, time.time),
        Traffic(held.traffic, ledger, random.Random()),
        held.trusted_proxies,
        held.asks_http,
        frozenset({websocket.PROTOCOL, *(name.encode() for policy in held.traffic for name in policy.upgrades)}),
        tuple(one for policy in held.traffic for one in policy.filters),
    )


class RuleBook:
    """The rules of one Gateway's destinations, each compiled once per configuration."""

    def __init__(self, state: State, gateway: str) -> None:
        """`gateway`: key of the Gateway."""
        self._state = state
        self._gateway = gateway
        self._generation = -1
        self._ledger = Ledger()
        self._rules: dict[tuple[IpAddress, int], Rules] = {}

    def __len__(self) -> int:
        return len(self._rules)

    def at(self, destination: Destination) -> Rules:
        """Those that hold now."""
        if self._generation != self._state.generation:
            self._generation = self._state.generation
            self._rules.clear()
            self._ledger.forget(self._state.traffic_policies())
        place = (destination.address, destination.dialled_port)
        rules = self._rules.get(place)
        if rules is None:
            rules = rules_at(self._state, self._gateway, destination, self._ledger)
            if len(self._rules) >= MAX_KEPT:
                self._rules.clear()
            self._rules[place] = rules
        return rules
