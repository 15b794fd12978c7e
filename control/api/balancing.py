"""How a waypoint chooses among the endpoints of a service, data only: part of a TrafficPolicy.

Names and meanings are those of Istio's DestinationRule. `waypoint.balancing` and `waypoint.outliers` act on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

MAX_ERRORS: Final = 1000
"""In a row, that may be asked for before an endpoint is ejected."""
MAX_AGGRESSION: Final = 1000
MAX_FAILOVERS: Final = 64


class Algorithm(Enum):
    """How one of several endpoints is chosen."""

    LEAST_REQUEST = "LEAST_REQUEST"
    """Of two that are drawn, the one with fewer requests under way."""
    ROUND_ROBIN = "ROUND_ROBIN"
    RANDOM = "RANDOM"


class HashOf(Enum):
    """What of a request says where it goes."""

    HEADER = "httpHeaderName"
    COOKIE = "httpCookie"
    PARAMETER = "httpQueryParameterName"
    ADDRESS = "useSourceIp"
    """The caller's workload."""
    IDENTITY = "useSourceIdentity"
    """The caller's SPIFFE ID: ours alone."""


@dataclass(frozen=True, slots=True)
class ConsistentHash:
    """Requests that are alike go to the same endpoint, as long as that is there."""

    of: HashOf
    name: str = ""
    """Of the header (in lower case), cookie or parameter."""
    ttl_ms: int | None = None
    """Of a cookie that is set where there is none; 0: until the browser ends; None: none is set."""
    path: str = ""
    """Of that cookie."""


@dataclass(frozen=True, slots=True)
class Warmup:
    """A new endpoint gets its share little by little."""

    duration_ms: int
    minimum_percent: int = 10
    """Of its share, with which it begins."""
    aggression: int = 100
    """In hundredths: with 100 the share grows with time, with more it grows faster at first."""


@dataclass(frozen=True, slots=True)
class Failover:
    """Where the requests of one region go when it has too few endpoints, before all others."""

    origin: str
    to: str


@dataclass(frozen=True, slots=True)
class LoadBalancing:
    """What is said of a service's endpoints."""

    algorithm: Algorithm = Algorithm.LEAST_REQUEST
    """Of requests without a hash, too."""
    hash: ConsistentHash | None = None
    warmup: Warmup | None = None
    local: bool = False
    """Whether endpoints near the waypoint come first."""
    failover: tuple[Failover, ...] = ()
    """In the order of their origins, each once."""


@dataclass(frozen=True, slots=True)
class OutlierDetection:
    """When an endpoint that fails is left alone for a while. 0 errors: that is no reason."""

    consecutive_5xx: int = 5
    consecutive_gateway: int = 0
    """502, 503 and 504."""
    consecutive_local_origin: int = 5
    """Requests that got no answer, where these are counted apart."""
    split_local_origin: bool = False
    """Else a request without an answer counts as one that was answered with 503, or 504 when it took too long."""
    interval_ms: int = 10_000
    """In each of which, without an ejection, one earlier ejection is forgotten."""
    base_ejection_ms: int = 30_000
    """For the first; as often as it was ejected, that much longer."""
    max_ejection_percent: int = 10
    min_health_percent: int = 0
    """With fewer that are not ejected, ejections do not count."""
