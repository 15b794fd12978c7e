"""What became of a route, in Gateway API's words (RouteParentStatus): whether each of its parents takes it, and whether
everything that it sends to is there. What a document says wrongly by itself is refused when it is applied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from control.api.filters import Mirror
from control.api.route import Backend, HTTPRoute, Parent
from control.api.workload import Service

ACCEPTED = "Accepted"
RESOLVED_REFS = "ResolvedRefs"
ENFORCED = "mesh.uproxy.dev/Enforced"
"""Whether a waypoint serves the parent; nobody else acts on routes."""

_Services = Callable[[str], Service | None]


@dataclass(frozen=True, slots=True)
class Condition:
    type: str
    status: bool
    reason: str
    """Gateway API's, where it has one."""
    message: str
    """For people; empty where all is well."""


@dataclass(frozen=True, slots=True)
class ParentStatus:
    """Of one parent."""

    service: str
    """Its key."""
    port: int
    """0: each of its ports."""
    conditions: tuple[Condition, ...]


def statuses_of(route: HTTPRoute, service: _Services) -> tuple[ParentStatus, ...]:
    """`service` finds those that are published, by their keys."""
    resolved = _resolved(route, service)
    return tuple(
        ParentStatus(
            parent.service,
            parent.port,
            (_accepted(parent, service(parent.service)), resolved, _enforced(service(parent.service))),
        )
        for parent in route.parents
    )


def _accepted(parent: Parent, service: Service | None) -> Condition:
    missing = _missing(parent, service)
    if missing:
        return Condition(ACCEPTED, False, "NoMatchingParent", missing)
    return Condition(ACCEPTED, True, ACCEPTED, "")


def _resolved(route: HTTPRoute, service: _Services) -> Condition:
    """Of all problems, the first is told."""
    for rule in route.rules:
        for destination in rule.destinations:
            if isinstance(destination, Backend) and destination.refused:
                message = f"no ReferenceGrant lets it send to Service {destination.service}"
                return Condition(RESOLVED_REFS, False, "RefNotPermitted", message)
            missing = _missing(destination, service(destination.service))
            if missing:
                return Condition(RESOLVED_REFS, False, "BackendNotFound", missing)
    return Condition(RESOLVED_REFS, True, RESOLVED_REFS, "")


def _missing(named: Parent | Backend | Mirror, service: Service | None) -> str:
    if service is None:
        return f"there is no Service {named.service}"
    if named.port and all(port.port != named.port for port in service.ports):
        return f"Service {named.service} has no port {named.port}"
    return ""


def _enforced(service: Service | None) -> Condition:
    if service is None or service.binding is None:
        return Condition(ENFORCED, False, "NoWaypoint", "the Service is bound to no waypoint")
    return Condition(ENFORCED, True, "WaypointBound", "")
