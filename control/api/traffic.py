"""TrafficPolicy, data only: how much a waypoint lets through to a service, what it breaks on purpose, and to which of
the service's endpoints requests go.

A kind of our own, since no other API has all of it. `waypoint.traffic` acts on it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from control.api.extension import Filter
from control.api.names import key
from control.api.policy import Target

if TYPE_CHECKING:
    from control.api.balancing import LoadBalancing, OutlierDetection

MAX_RATE_LIMITS: Final = 16
MAX_REQUESTS: Final = 1_000_000
MAX_FILTERS: Final = 8
MAX_REDIS_MS: Final = 10_000
DEFAULT_REDIS_MS: Final = 100
MAX_UPGRADES: Final = 8
MAX_RULES: Final = 64
"""Names of one rate limit."""
DEFAULT_PENDING: Final = 1024
"""Envoy's."""


_PROTOCOL: Final = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]{1,32}(/[!#$%&'*+.^_`|~0-9a-z-]{1,32})?")
_HTTP: Final = re.compile(r"(h2c|h2|h3|https?|http2|tls)(/.*)?")


def wrong_upgrade(text: str) -> str:
    """What is wrong with the name of a protocol, in lower case, that requests may upgrade to; empty when nothing is."""
    if _PROTOCOL.fullmatch(text) is None:
        return "must be the name of a protocol, as in `Upgrade`: such as spdy/3.1"
    if text == "websocket":
        return "is always taken; remove it"
    if _HTTP.fullmatch(text):
        return "would carry requests past every policy; it is never taken"
    return ""


class Share(Enum):
    """Who has an allowance of their own under a rate limit."""

    ALL = "All"
    """Nobody: all callers together have one."""
    IDENTITY = "Identity"
    """Each SPIFFE ID that calls."""
    HEADER = "Header"
    """Each value of a header. Requests without it have one together."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A token bucket. Counted by each process of a waypoint for itself, unless it is `everywhere`."""

    requests: int
    """In each `per_ms`, evenly."""
    per_ms: int
    burst: int
    """How many at once, after a pause."""
    share: Share = Share.ALL
    header: str = ""
    """In lower case; empty unless it is shared by one."""
    rules: tuple[str, ...] = ()
    """Names of rules of routes: only requests that fall under one of them count. Empty: all."""
    everywhere: bool = False
    """Counted by all processes together, in the policy's Redis."""


@dataclass(frozen=True, slots=True)
class Redis:
    """Where what all processes count together is kept. It is reached through the mesh."""

    service: str
    """Key of a Service."""
    port: int
    timeout_ms: int = DEFAULT_REDIS_MS
    """For its answer about one request."""
    fail_open: bool = True
    """Whether a request about which it says nothing goes through."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to some of the requests, drawn by chance."""

    percentage: int
    """Of the requests, from 1 to 100."""
    delay_ms: int = 0
    """They wait for so long first; 0: this is no delay."""
    status: int = 0
    """They are answered with it; 0: they are not."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Of what each process of a waypoint has open to the workloads of a service. 0: any number."""

    connections: int = 0
    """HTTP and opaque TCP, those included that wait for a request."""
    pending: int = 0
    """Requests and connections that wait for one of `connections` to be free."""
    requests_each: int = 0
    """That one connection carries before it is closed."""


@dataclass(frozen=True, slots=True)
class TrafficPolicy:
    """Holds at the waypoints of what it targets, for requests."""

    namespace: str
    name: str
    targets: tuple[Target, ...]
    """In order, each once; at least one."""
    rate_limits: tuple[RateLimit, ...] = ()
    """All of them hold."""
    max_requests: int = 0
    """At one time, of each process of the waypoint; 0: any number."""
    faults: tuple[Fault, ...] = ()
    connection_limits: ConnectionLimits | None = None
    load_balancing: LoadBalancing | None = None
    """None: at random, by weight."""
    outlier_detection: OutlierDetection | None = None
    filters: tuple[Filter, ...] = ()
    """In the order in which requests come to them; responses come to the last one first."""
    redis: Redis | None = None
    """There is one exactly when some rate limit is counted everywhere."""
    upgrades: tuple[str, ...] = ()
    """Protocols that requests may upgrade to besides WebSocket, in lower case, in order."""

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)
