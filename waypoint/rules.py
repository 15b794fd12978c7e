"""What holds at one destination of a waypoint: its routes and policies, compiled from the state."""

from __future__ import annotations

from dataclasses import dataclass

from control.api.policy import Target
from control.client.state import State
from waypoint.authz import Policies, compile_policies
from waypoint.destination import Destination
from waypoint.routing import Router, compile_routes


@dataclass(frozen=True, slots=True)
class Rules:
    """Never change; made by `rules_at` for one generation of the state."""

    router: Router
    policies: Policies


def rules_at(state: State, gateway: str, destination: Destination) -> Rules:
    """`gateway`: key of the waypoint's Gateway. All policies of it and of the destination's services hold."""
    keys = tuple(service.key for service in destination.services)
    targets = (Target("Gateway", gateway), *(Target("Service", key) for key in keys))
    policies = {p.key: p for target in targets for p in state.policies_targeting(target.kind, target.key)}
    first = destination.service_key
    routes = state.routes_for(first) if keys else ()
    return Rules(compile_routes(routes, first, destination.port), compile_policies(policies.values()))
