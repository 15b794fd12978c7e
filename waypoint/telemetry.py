"""What is counted and logged of each request: Istio's HTTP metrics with `reporter="waypoint"`, and Istio's log fields.

Connections of opaque TCP are counted and logged as in a uProxy (`uproxy.telemetry`).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from control.api.workload import Workload, host_of_key
from uproxy import trace
from uproxy.access_log import AccessLog, Field, json_line
from uproxy.rehearsal import Rehearsals
from uproxy.telemetry import MAX_LISTED, MAX_SERIES, UNKNOWN, Listing, Peer, Span, Telemetry, escaped, peer_labels

_COMPLETE: Final = "request complete"

REQUESTS: Final = "istio_requests_total"
DURATION: Final = "istio_request_duration_milliseconds"
BUCKETS_MS: Final = (
    0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000,
    600_000, 1_800_000, 3_600_000,
)  # fmt: skip
"""Istio's."""

# Envoy's response flags, as Istio's dashboards know them.
NO_FLAG: Final = "-"
CALLER_GONE: Final = "DC"
BACKEND_BROKE: Final = "UC"
BACKEND_UNREACHABLE: Final = "UF"
NO_BACKEND: Final = "UH"
NO_ROUTE: Final = "NR"
TIMED_OUT: Final = "UT"
MALFORMED: Final = "DPE"
RATE_LIMITED: Final = "RL"
TOO_MANY: Final = "UO"
ABORTED: Final = "FI"
DELAYED: Final = "DI"


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and what became of it."""

    source: Peer
    destination: Peer
    """The backend's port 15008, once one was chosen."""
    started: float
    """Monotonic seconds."""
    request_id: str
    destination_service: str = ""
    """`namespace/name` of the service that was dialled; empty when a workload was."""
    method: str = ""
    path: str = ""
    """With its query, as routes and policies saw it; as it came when they did not."""
    authority: str = ""
    """The Host field."""
    protocol: str = "HTTP/1.1"
    user_agent: str = ""
    grpc: bool = False
    grpc_status: str = ""
    """A number; empty when none has come."""
    route: str = ""
    """The name of the route's rule, if it has one."""
    backend_service: str = ""
    """`namespace/name`."""
    hbone_address: str = ""
    """`:authority` of the CONNECT to the backend."""
    status: int = 0
    """0: there was no answer."""
    flag: str = NO_FLAG
    details: str = ""
    """Why this proxy answered by itself or gave up."""
    policy: str = ""
    """The rule that refused."""
    dry_run: str = ""
    """What would have been decided otherwise with policies in dry run."""
    received: int = 0
    """Bytes of the request's body."""
    sent: int = 0
    """Bytes of the response's body."""
    attempts: int = 0
    trace: str = ""
    """32 hex digits: the caller's, if that records it, else made of `request_id` where this can be."""
    span: str = ""
    """Its id (16 hex digits) in the trace, if this proxy records it."""
    parent_span: str = ""
    """The caller's span, if that is recorded."""

    @property
    def traceparent(self) -> bytes:
        """What the backend is told (W3C Trace Context)."""
        return trace.write(self.trace, self.span, self.parent_span)


class WaypointTelemetry(Telemetry):
    """The counters of one waypoint."""

    def __init__(self, version: str, log: AccessLog | None = None) -> None:
        super().__init__(version, log)
        self.rehearsals = Rehearsals(self)
        self._requests_log = log
        self._under_way: set[Exchange] = set()
        self._requests: dict[str, _Series] = {}
        # The key holds id()s of workloads, so the value holds the workloads: an id stays theirs.
        self._known_requests: dict[_Key, tuple[_Series, Workload | None, Workload | None]] = {}

    def began(self, exchange: Exchange) -> None:
        """A request has come; `answered` ends it."""
        self._under_way.add(exchange)

    def live(self, now: float, wall: float) -> Listing:
        """Requests too."""
        connections = super().live(now, wall)
        youngest = heapq.nlargest(MAX_LISTED, self._under_way, key=lambda exchange: exchange.started)
        lines = [
            json_line("request", "info", partial(_fields, exchange, (now - exchange.started) * 1000), wall)
            for exchange in youngest
        ]
        return Listing(connections.total + len(self._under_way), connections.lines + lines)

    def answered(self, exchange: Exchange, now: float) -> None:
        """A request is over, at `now` (monotonic seconds)."""
        took_ms = (now - exchange.started) * 1000
        series = self._series_of(exchange)
        series.buckets[bisect_left(BUCKETS_MS, took_ms)] += 1
        series.sum_ms += took_ms
        self._under_way.discard(exchange)
        if exchange.span and self.spans is not None:
            self.spans.add(_span(exchange, now))
        if self._requests_log is not None or self.taps.watched:
            level = "info" if exchange.flag == NO_FLAG and not exchange.details else "error"
            fields = partial(_fields, exchange, took_ms)
            if self._requests_log is not None:
                self._requests_log.note(_COMPLETE, level, fields)
            if self.taps.watched:
                self.taps.note(_COMPLETE, level, fields)

    def istio_lines(self) -> Iterator[str]:
        yield f"# HELP {REQUESTS} The total number of requests"
        yield f"# TYPE {REQUESTS} counter"
        for series in self._requests.values():
            yield f"{REQUESTS}{{{series.labels}}} {sum(series.buckets)}"
        yield f"# HELP {DURATION} From a request's head to the end of its response"
        yield f"# TYPE {DURATION} histogram"
        for series in self._requests.values():
            count = 0
            for bound, counted in zip((*BUCKETS_MS, "+Inf"), series.buckets, strict=True):
                count += counted
                yield f'{DURATION}_bucket{{{series.labels},le="{bound}"}} {count}'
            yield f"{DURATION}_sum{{{series.labels}}} {series.sum_ms:.3f}"
            yield f"{DURATION}_count{{{series.labels}}} {count}"
        yield from super().istio_lines()

    def _series_of(self, exchange: Exchange) -> _Series:
        key = (
            id(exchange.source.workload),
            exchange.source.identity,
            id(exchange.destination.workload),
            exchange.destination.identity,
            exchange.destination_service,
            exchange.status,
            exchange.flag,
            exchange.grpc,
            exchange.grpc_status,
        )
        known = self._known_requests.get(key)
        if known is not None:
            return known[0]
        labels = _labels(exchange)
        series = self._requests.get(labels)
        if series is None:
            if len(self._requests) >= MAX_SERIES:
                nobody = Peer("")
                labels = _labels(Exchange(nobody, nobody, 0.0, "", status=exchange.status, flag=exchange.flag))
            series = self._requests.setdefault(labels, _Series(labels))
        if len(self._known_requests) >= 2 * MAX_SERIES:
            self._known_requests.clear()
        self._known_requests[key] = (series, exchange.source.workload, exchange.destination.workload)
        return series


def _span(exchange: Exchange, now: float) -> Span:
    failed = exchange.flag != NO_FLAG or exchange.status >= 500
    return Span(
        trace=exchange.trace,
        id=exchange.span,
        parent=exchange.parent_span,
        name=_hostname(exchange.destination_service) or exchange.authority,
        kind="server",
        started=exchange.started,
        ended=now,
        fields=partial(_fields, exchange, (now - exchange.started) * 1000),
        error=(exchange.details or str(exchange.status)) if failed else None,
    )


class _Series:
    """The counts under one label set."""

    __slots__ = ("buckets", "labels", "sum_ms")

    def __init__(self, labels: str) -> None:
        self.labels = labels
        self.buckets = [0] * (len(BUCKETS_MS) + 1)
        self.sum_ms = 0.0


_Key = tuple[int, str, int, str, str, int, str, bool, str]


def _hostname(service: str) -> str:
    return host_of_key(service) if service else ""


def _labels(exchange: Exchange) -> str:
    """Istio's labels in Istio's order."""
    namespace, _, name = exchange.destination_service.partition("/")
    values = [
        ("reporter", "waypoint"),
        *peer_labels("source", exchange.source),
        ("destination_service", _hostname(exchange.destination_service)),
        ("destination_service_namespace", namespace),
        ("destination_service_name", name),
        *peer_labels("destination", exchange.destination),
        ("request_protocol", "grpc" if exchange.grpc else "http"),
        ("response_code", str(exchange.status)),
        *((("grpc_response_status", exchange.grpc_status),) if exchange.grpc else ()),
        ("response_flags", exchange.flag),
        ("connection_security_policy", "mutual_tls"),
    ]
    return ",".join(f'{label}="{escaped(value or UNKNOWN)}"' for label, value in values)


def _fields(exchange: Exchange, took_ms: float, field: Field) -> list[str]:
    """Istio's names and order; the fields that Istio has not follow."""
    values: tuple[tuple[str, str | int], ...] = (
        ("method", exchange.method),
        ("path", exchange.path),
        ("protocol", exchange.protocol),
        ("response_code", exchange.status),
        ("response_flags", exchange.flag),
        ("response_code_details", exchange.details),
        ("grpc_status", exchange.grpc_status),
        ("bytes_received", exchange.received),
        ("bytes_sent", exchange.sent),
        ("duration", int(took_ms)),
        ("user_agent", exchange.user_agent),
        ("request_id", exchange.request_id),
        ("authority", exchange.authority),
        ("upstream_host", exchange.hbone_address),
        ("upstream_cluster", exchange.backend_service),
        ("downstream_remote_address", exchange.source.address),
        ("route_name", exchange.route),
        ("source_principal", exchange.source.identity),
        ("destination_principal", exchange.destination.identity),
        ("destination_service", exchange.destination_service),
        ("policy", exchange.policy),
        ("dry_run", exchange.dry_run),
        ("attempts", exchange.attempts),
    )
    return [field(name, value) for name, value in values if value != ""]
