"""TrafficPolicy, data only: how much a waypoint lets through to a service, and what it breaks on purpose.

A kind of our own, since no other API has all of it. `waypoint.traffic` acts on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from control.api.names import key
from control.api.policy import Target

MAX_RATE_LIMITS: Final = 16
MAX_REQUESTS: Final = 1_000_000
MAX_RULES: Final = 64
"""Names of one rate limit."""


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
    """A token bucket. Counted by each process of a waypoint for itself."""

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

    @property
    def key(self) -> str:
        return key(self.namespace, self.name)
