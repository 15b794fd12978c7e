"""HTTPRoute (Gateway API v1) attached to Services, data only; `waypoint.routing` decides."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from control.api.filters import NO_FILTERS, Filters, Mirror
from control.api.http_text import normal_path, wrong_header_name
from control.api.names import key, wrong_subdomain
from control.api.problems import shown

METHODS: Final = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")
"""Those that Gateway API lets a match name."""
MAX_WEIGHT: Final = 1_000_000  # Gateway API's
MAX_ATTEMPTS: Final = 10
"""After the first: more would make of one request that fails a flood."""
MAX_EXPRESSION: Final = 1024  # Gateway API's, of a path

_QUERY_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}")
UNTOUCHED: Final = frozenset(
    (
        "connection",
        "content-length",
        "expect",
        "host",
        "http2-settings",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-forwarded-client-cert",
        "x-forwarded-for",
    )
)
"""Headers by which messages end or callers are known: a waypoint's own to write."""
OURS: Final = "x-uproxy-"
"""What the names of others of these begin with."""


class PathKind(Enum):
    """How a path is compared."""

    EXACT = "Exact"
    PREFIX = "PathPrefix"
    """By whole elements: `/v2` matches `/v2` and `/v2/x`, not `/v2x`."""
    EXPRESSION = "RegularExpression"
    """The whole path, with `control.api.expression`."""


@dataclass(frozen=True, slots=True)
class PathMatch:
    kind: PathKind
    value: str


@dataclass(frozen=True, slots=True)
class HeaderMatch:
    """A match of a header's whole value."""

    name: str
    """In lower case."""
    value: str
    expression: bool = False
    """Whether the value is a regular expression; else it is exact."""


@dataclass(frozen=True, slots=True)
class QueryMatch:
    """A match of a query parameter's whole decoded value."""

    name: str
    value: str
    expression: bool = False
    """As of a header."""


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
    """Key of a service."""
    port: int
    weight: int
    """0: none of them."""
    request: HeaderModifier
    response: HeaderModifier
    filters: Filters = NO_FILTERS
    """Without CORS."""
    refused: bool = False
    """Whether the service's namespace does not let the route send there: its share is answered with 500."""


@dataclass(frozen=True, slots=True)
class Retry:
    """When a request is sent once more: where nobody answers, and where the answer is one of these."""

    codes: tuple[int, ...]
    """Status codes from 400 to 599, in order; perhaps none."""
    attempts: int
    """At most so many after the first."""
    backoff_ms: int
    """At least so long after the one before."""


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
    filters: Filters = NO_FILTERS
    retry: Retry | None = None

    @property
    def destinations(self) -> tuple[Backend | Mirror, ...]:
        """Wherever its requests, or copies of them, may go."""
        filters = (self.filters, *(backend.filters for backend in self.backends))
        return (*self.backends, *(mirror for one in filters for mirror in one.mirrors))


@dataclass(frozen=True, slots=True)
class Parent:
    """To what a route is attached."""

    service: str
    """Key of a service, as it is published of the route's own namespace."""
    port: int
    """0: each of its ports."""


@dataclass(frozen=True, slots=True)
class HTTPRoute:
    """A route, as its waypoints know it."""

    namespace: str
    name: str
    parents: tuple[Parent, ...]
    """At least one."""
    hostnames: tuple[str, ...]
    """`example.com` or `*.example.com`; none: every host."""
    rules: tuple[RouteRule, ...]
    callers: str = ""
    """The namespace whose callers it is for, who declared it there: it is published in its parents', as `callers.name`.

    Empty: it is for every caller for whom there is no such route.
    """

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)


def canonical_route_path(kind: PathKind, text: str) -> str:
    """The one form of the value of a path match. Raises ValueError for one that could match nothing."""
    if kind is PathKind.EXPRESSION:
        if problem := wrong_expression(text):
            raise ValueError(problem)
        return text
    if not text.startswith("/"):
        raise ValueError(f"{shown(text)} must begin with '/'")
    if "//" in text:
        raise ValueError(f"{shown(text)} has an empty element, '//'; write one '/'")
    path = normal_path(text)
    return path.rstrip("/") or "/" if kind is PathKind.PREFIX else path


def wrong_expression(text: str) -> str:
    """What is wrong with a regular expression, or an empty string."""
    if not 1 <= len(text) <= MAX_EXPRESSION:
        return f"{shown(text)} must have 1 to {MAX_EXPRESSION} characters"
    from control.api.expression import expression  # here, as a uProxy that runs has no routes

    try:
        expression(text)
    except ValueError as error:
        return str(error)
    return ""


def wrong_hostname(text: str) -> str:
    """What is wrong with a route's host name, or an empty string."""
    name = text.removeprefix("*.")
    if problem := wrong_subdomain(name):
        return problem
    # Gateway API: a host name, never an address.
    return f"{shown(text)} is an address; write a host name" if name.rpartition(".")[2].isdigit() else ""


def wrong_query_name(text: str) -> str:
    """What is wrong with the name of a query parameter, or an empty string."""
    return "" if _QUERY_NAME.fullmatch(text) else f"{shown(text)} is no name of a query parameter"


def wrong_query_value(text: str) -> str:
    """What is wrong with a query parameter's decoded value, or an empty string."""
    return "" if 1 <= len(text) <= 1024 else f"{shown(text)} must have 1 to 1024 characters"


def wrong_modified(name: str) -> str:
    """What is wrong with a route's setting, adding to or removing a header, or an empty string."""
    if problem := wrong_header_name(name):
        return problem
    if name in UNTOUCHED or name.startswith(OURS):
        return f"{name!r} is the waypoint's own to write, since messages end by it or callers are known by it"
    return ""
