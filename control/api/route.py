"""HTTPRoute (Gateway API v1) attached to Services, data only; `waypoint.routing` decides."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from control.api.workload import key


class PathKind(Enum):
    """How a path is compared."""

    EXACT = "Exact"
    PREFIX = "PathPrefix"
    """By whole elements: `/v2` matches `/v2` and `/v2/x`, not `/v2x`."""


@dataclass(frozen=True, slots=True)
class PathMatch:
    kind: PathKind
    value: str


@dataclass(frozen=True, slots=True)
class HeaderMatch:
    """An exact match of a header's whole value."""

    name: str
    """In lower case."""
    value: str


@dataclass(frozen=True, slots=True)
class QueryMatch:
    """An exact match of a query parameter's decoded value."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Match:
    """All of it must hold. An empty field asks nothing."""

    path: PathMatch
    """`/` as a prefix when nothing was said."""
    headers: tuple[HeaderMatch, ...]
    query: tuple[QueryMatch, ...]
    method: str


@dataclass(frozen=True, slots=True)
class HeaderModifier:
    """What becomes of headers; names in lower case. `set` replaces, `add` appends `, value`, `remove` comes last."""

    set: tuple[tuple[str, str], ...] = ()
    add: tuple[tuple[str, str], ...] = ()
    remove: tuple[str, ...] = ()


NO_MODIFIER = HeaderModifier()


@dataclass(frozen=True, slots=True)
class Backend:
    """One place for a rule's requests to go."""

    service: str
    """Key of a service of the route's own namespace."""
    port: int
    weight: int
    """0: none of them."""
    request: HeaderModifier
    response: HeaderModifier


@dataclass(frozen=True, slots=True)
class RouteRule:
    """Requests that match go to one of the backends; without backends they are answered with 500."""

    name: str
    matches: tuple[Match, ...]
    """At least one; one of them must hold."""
    request: HeaderModifier
    response: HeaderModifier
    backends: tuple[Backend, ...]
    timeout_ms: int
    """From the request's head to the end of the response; 0: none."""
    backend_timeout_ms: int
    """Of one attempt, likewise; 0: none."""


@dataclass(frozen=True, slots=True)
class Parent:
    """To what a route is attached."""

    service: str
    """Key of a service of the route's own namespace."""
    port: int
    """0: each of its ports."""


@dataclass(frozen=True, slots=True)
class HTTPRoute:
    namespace: str
    name: str
    parents: tuple[Parent, ...]
    """At least one."""
    hostnames: tuple[str, ...]
    """`example.com` or `*.example.com`; none: every host."""
    rules: tuple[RouteRule, ...]

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)
