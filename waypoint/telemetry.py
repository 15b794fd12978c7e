"""What is counted and logged of each request: Istio's HTTP metrics with `reporter="waypoint"`, and Istio's log fields.

Connections of opaque TCP are counted and logged as in a uProxy (`uproxy.telemetry`).
"""

from __future__ import annotations

import heapq
import http
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from control.api.workload import Workload, host_of_key
from uproxy import trace
from uproxy.access_log import AccessLog, Field, json_line
from uproxy.rehearsal import Rehearsals
from uproxy.telemetry import (
    IDLE_S,
    MAX_LISTED,
    MAX_SERIES,
    UNKNOWN,
    Listing,
    Peer,
    Span,
    Telemetry,
    escaped,
    peer_labels,
)
from waypoint.grpc_messages import MessageCounter

_COMPLETE: Final = "request complete"
_NOBODY: Final = Peer("")
_CODES: Final = {0: "0", **{int(status): str(int(status)) for status in http.HTTPStatus}}
_GRPC_CODES: Final = frozenset(map(str, range(17)))

REQUESTS: Final = "istio_requests_total"
DURATION: Final = "istio_request_duration_milliseconds"
RECEIVED: Final = "istio_request_bytes"
SENT: Final = "istio_response_bytes"
REQUEST_MESSAGES: Final = "istio_request_messages_total"
RESPONSE_MESSAGES: Final = "istio_response_messages_total"
BUCKETS: Final = (
    0.5, 1, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000,
    600_000, 1_800_000, 3_600_000,
)  # fmt: skip
"""Istio's, of milliseconds and of bytes."""

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
UNAUTHORIZED: Final = "UAEX"
ABORTED: Final = "FI"
DELAYED: Final = "DI"
OVERLOADED: Final = "OM"
NOT_COUNTED: Final = "RLSE"


@dataclass(slots=True, eq=False)
class Attempt:
    """A request on its way to one backend, as a part of a trace."""

    span: str
    """16 hex digits."""
    started: float
    """Monotonic seconds, as what follows."""
    ended: float = 0.0
    """0: it is the last one, and ends with the request."""
    upstream: str = ""
    """As `Exchange.hbone_address`; empty when nobody was reached."""
    failed: str = ""
    """Why another one followed it."""


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
    audit: str = ""
    """The rule of an AUDIT policy that matches."""
    dry_run: str = ""
    """What would have been decided otherwise with policies in dry run."""
    received: int = 0
    """Bytes of the request's body."""
    sent: int = 0
    """Bytes of the response's body."""
    request_messages: MessageCounter | None = None
    """Those of gRPC; None for other protocols."""
    response_messages: MessageCounter | None = None
    attempts: int = 0
    upstream_s: float = 0.0
    """How long backends took to begin their answers, in all attempts."""
    timed: bool = False
    """Whether the caller wants to know how long this proxy took."""
    measured: bool = False
    """Whether anybody wants to know how long backends took."""
    dialled: str = ""
    """What the caller's uProxy asked for: an address or a name, and a port."""
    forwarded_for: str = ""
    """The header as it goes on; empty where it is but the caller's address."""
    tries: tuple[Attempt, ...] = ()
    """Of a request that this proxy records."""
    trace: str = ""
    """32 hex digits: the caller's, if that records it, else made of `request_id` where this can be."""
    span: str = ""
    """Its id (16 hex digits) in the trace, if this proxy records it."""
    parent_span: str = ""
    """The caller's span, if that is recorded."""

    @property
    def traceparent(self) -> bytes:
        """What is told to who is called next (W3C Trace Context)."""
        own = self.tries[-1].span if self.tries and not self.tries[-1].ended else self.span
        return trace.write(self.trace, own, self.parent_span)

    def failed(self, why: str, now: float) -> None:
        """The attempt has, and another one may follow. `now`: monotonic seconds."""
        if self.tries:
            last = self.tries[-1]
            last.ended, last.failed, last.upstream = now, why, self.hbone_address

    def server_timing(self, now: float) -> bytes:
        """For the caller (W3C Server Timing), in milliseconds: what this proxy took, and what backends did."""
        own_ms = max(0.0, now - self.started - self.upstream_s) * 1000
        return b"waypoint;dur=%.3f, upstream;dur=%.3f" % (own_ms, self.upstream_s * 1000)


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
        exchange.measured = exchange.timed or self._requests_log is not None
        self._under_way.add(exchange)

    @property
    def under_way(self) -> int:
        """Requests."""
        return len(self._under_way)

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
        series = self._series_of(exchange, now)
        series.used = now
        series.took[bisect_left(BUCKETS, took_ms)] += 1
        series.took_ms += took_ms
        if exchange.received:
            series.received[bisect_left(BUCKETS, exchange.received)] += 1
            series.received_bytes += exchange.received
        if exchange.sent:
            series.sent[bisect_left(BUCKETS, exchange.sent)] += 1
            series.sent_bytes += exchange.sent
        if exchange.request_messages is not None and exchange.response_messages is not None:
            series.request_messages += exchange.request_messages.count
            series.response_messages += exchange.response_messages.count
        self._under_way.discard(exchange)
        if exchange.audit:
            self._audited += 1
        if exchange.span and self.spans is not None:
            self.spans.add(_span(exchange, now))
            for attempt in exchange.tries:
                self.spans.add(_attempt_span(exchange, attempt, now))
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
            yield f"{REQUESTS}{{{series.labels}}} {sum(series.took)}"
        every = self._requests.values()
        took = ((series.labels, series.took, f"{series.took_ms:.3f}") for series in every)
        yield from _histogram(DURATION, "From a request's head to the end of its response", took)
        received = ((series.labels, series.with_empty(series.received), str(series.received_bytes)) for series in every)
        yield from _histogram(RECEIVED, "The bodies of requests", received)
        sent = ((series.labels, series.with_empty(series.sent), str(series.sent_bytes)) for series in every)
        yield from _histogram(SENT, "The bodies of responses", sent)
        yield f"# HELP {REQUEST_MESSAGES} The messages of gRPC requests"
        yield f"# TYPE {REQUEST_MESSAGES} counter"
        for series in self._requests.values():
            if series.request_messages:
                yield f"{REQUEST_MESSAGES}{{{series.labels}}} {series.request_messages}"
        yield f"# HELP {RESPONSE_MESSAGES} The messages of gRPC responses"
        yield f"# TYPE {RESPONSE_MESSAGES} counter"
        for series in self._requests.values():
            if series.response_messages:
                yield f"{RESPONSE_MESSAGES}{{{series.labels}}} {series.response_messages}"
        yield from super().istio_lines()

    def _series_of(self, exchange: Exchange, now: float) -> _Series:
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
            if len(self._requests) >= MAX_SERIES and not self._evict_requests(now):
                self._overflows += 1
                # At most one for each class of status, and flag, beyond the cap.
                labels = _labels(Exchange(_NOBODY, _NOBODY, 0.0, "", flag=exchange.flag), _class_of(exchange.status))
                return self._requests.setdefault(labels, _Series(labels))
            series = self._requests[labels] = _Series(labels)
        if len(self._known_requests) >= 2 * MAX_SERIES:
            self._known_requests.clear()
        self._known_requests[key] = (series, exchange.source.workload, exchange.destination.workload)
        return series

    def _evict_requests(self, now: float) -> bool:
        idle = [labels for labels, series in self._requests.items() if now - series.used >= IDLE_S]
        for labels in idle:
            del self._requests[labels]
        if idle:
            self._known_requests.clear()
        return bool(idle)


def _histogram(name: str, help_text: str, of: Iterable[tuple[str, Sequence[int], str]]) -> Iterator[str]:
    """`of`: labels, the count of each bucket, and the sum of what is counted."""
    yield f"# HELP {name} {help_text}"
    yield f"# TYPE {name} histogram"
    for labels, buckets, total in of:
        count = 0
        for bound, counted in zip((*BUCKETS, "+Inf"), buckets, strict=True):
            count += counted
            yield f'{name}_bucket{{{labels},le="{bound}"}} {count}'
        yield f"{name}_sum{{{labels}}} {total}"
        yield f"{name}_count{{{labels}}} {count}"


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


def _attempt_span(exchange: Exchange, attempt: Attempt, now: float) -> Span:
    """A child of the request's span, and the parent of the backend's."""
    last = not attempt.ended
    upstream = exchange.hbone_address if last else attempt.upstream
    broken = exchange.flag != NO_FLAG or exchange.status >= 500

    def fields(field: Field) -> list[str]:
        values: tuple[tuple[str, str | int], ...] = (
            ("method", exchange.method),
            ("upstream_host", upstream),
            ("upstream_cluster", exchange.backend_service),
            *((("response_code", exchange.status),) if last else ()),
        )
        return [field(name, value) for name, value in values if value != ""]

    return Span(
        trace=exchange.trace,
        id=attempt.span,
        parent=exchange.span,
        name=_hostname(exchange.backend_service or exchange.destination_service) or exchange.authority,
        kind="client",
        started=attempt.started,
        ended=attempt.ended or now,
        fields=fields,
        error=attempt.failed or ((exchange.details or str(exchange.status)) if last and broken else None),
    )


class _Series:
    """The counts under one label set."""

    __slots__ = (
        "labels",
        "received",
        "received_bytes",
        "request_messages",
        "response_messages",
        "sent",
        "sent_bytes",
        "took",
        "took_ms",
        "used",
    )

    def __init__(self, labels: str) -> None:
        self.labels = labels
        self.took, self.received, self.sent = ([0] * (len(BUCKETS) + 1) for _ in range(3))
        self.took_ms = 0.0
        self.received_bytes = self.sent_bytes = 0
        self.request_messages = self.response_messages = 0
        self.used = 0.0
        """When a request was last counted, in monotonic seconds."""

    def with_empty(self, sizes: list[int]) -> list[int]:
        """Empty bodies, which are not counted one by one, too."""
        return [sizes[0] + sum(self.took) - sum(sizes), *sizes[1:]]


_Key = tuple[int, str, int, str, str, int, str, bool, str]


def _hostname(service: str) -> str:
    return host_of_key(service) if service else ""


def _code(status: int) -> str:
    """A status that is registered, or else its class: a backend may write any, and each is a label set of its own."""
    return _CODES.get(status) or _class_of(status)


def _class_of(status: int) -> str:
    return f"{status // 100}xx" if status else "0"


def _grpc_code(status: str) -> str:
    """Likewise; those that gRPC knows are from 0 to 16."""
    return status if status in _GRPC_CODES else ""


def _labels(exchange: Exchange, code: str = "") -> str:
    """Istio's labels in Istio's order. `code`: in place of the status."""
    namespace, _, name = exchange.destination_service.partition("/")
    values = [
        ("reporter", "waypoint"),
        *peer_labels("source", exchange.source),
        ("destination_service", _hostname(exchange.destination_service)),
        ("destination_service_namespace", namespace),
        ("destination_service_name", name),
        *peer_labels("destination", exchange.destination),
        ("request_protocol", "grpc" if exchange.grpc else "http"),
        ("response_code", code or _code(exchange.status)),
        *((("grpc_response_status", _grpc_code(exchange.grpc_status)),) if exchange.grpc else ()),
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
        ("upstream_service_time", int(exchange.upstream_s * 1000) if exchange.upstream_s else ""),
        ("x_forwarded_for", exchange.forwarded_for),
        ("upstream_host", exchange.hbone_address),
        ("upstream_cluster", exchange.backend_service),
        ("downstream_local_address", exchange.dialled),
        ("downstream_remote_address", exchange.source.address),
        ("route_name", exchange.route),
        ("source_principal", exchange.source.identity),
        ("destination_principal", exchange.destination.identity),
        ("destination_service", exchange.destination_service),
        ("policy", exchange.policy),
        ("audit", exchange.audit),
        ("dry_run", exchange.dry_run),
        ("attempts", exchange.attempts),
    )
    return [field(name, value) for name, value in values if value != ""]
