"""What holds at one destination of a waypoint: its routes and policies, compiled from the state."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Final

from control.api.address import IpAddress
from control.api.policy import Target
from control.client.state import State
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


def rules_at(state: State, gateway: str, destination: Destination, ledger: Ledger) -> Rules:
    """`gateway`: key of the waypoint's Gateway. All policies of it and of the destination's services hold, and so do
    their RequestAuthentications and TrafficPolicies, which count in the ledger."""
    keys = tuple(service.key for service in destination.services)
    targets = (Target("Gateway", gateway), *(Target("Service", key) for key in keys))
    policies = {p.key: p for target in targets for p in state.policies_targeting(target.kind, target.key)}
    first = destination.service_key
    routes = state.routes_for(first) if keys else ()
    traffic = {one.key: one for t in targets for one in state.traffic_targeting(t.kind, t.key)}
    authentications = {one.key: one for t in targets for one in state.authentications_targeting(t.kind, t.key)}
    return Rules(
        compile_routes(routes, first, destination.port),
        compile_policies(policies.values()),
        Tokens(authentications.values(), time.time),
        Traffic([traffic[its] for its in sorted(traffic)], ledger, random.Random()),
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
