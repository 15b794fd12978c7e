"""What is counted and logged of each connection: Istio's TCP metrics, in Prometheus' text format, and the access log.

The hot path is `opened` and `closed`, once per connection. Label text is made once per combination of peers, service
and flag, and kept in a bounded table. Bytes are not counted here: a scrape reads them from the live connections.
"""

from __future__ import annotations

import heapq
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, Protocol

from control.api.workload import Workload, host_of_key
from uproxy import access_log, trace
from uproxy.access_log import AccessLog
from uproxy.errors import Flag
from uproxy.tap import Taps

MAX_SERIES: Final = 500
"""Label sets kept; each costs about 1 KiB here and up to 5 KiB of a scrape. Further ones are counted as "unknown"."""
MAX_LISTED: Final = 1000
"""Connections shown at once, which takes some 10 ms."""
IDLE_S: Final = 600.0
"""A label set unused for so long gives up its place when the table is full (Linkerd drops idle series so, too)."""

OPENED: Final = "istio_tcp_connections_opened_total"
CLOSED: Final = "istio_tcp_connections_closed_total"
FAILED: Final = "istio_tcp_connections_failed_total"
RECEIVED: Final = "istio_tcp_received_bytes_total"
SENT: Final = "istio_tcp_sent_bytes_total"
BUILD: Final = "istio_build"

UNKNOWN: Final = "unknown"
_NAME: Final = re.compile(r"uproxy_[a-z0-9]+(_[a-z0-9]+)*")

_log = logging.getLogger(__name__)
_access = logging.getLogger("access")  # at debug, connections are logged when they open, too, as ztunnel does


class Meter(Protocol):
    """What counts a live connection's bytes, from the point of view of this proxy's workload."""

    sent: int
    received: int


@dataclass(slots=True)
class Peer:
    """One end of a connection, as far as it is known."""

    address: str
    """`ip:port`, `[ip]:port`."""
    workload: Workload | None = None
    identity: str = ""
    """The SPIFFE ID that a certificate proved in this connection; not one that was only expected."""


@dataclass(frozen=True, slots=True)
class Native:
    """What the kernel says of a connection that went direct (`direct`), without a tunnel."""

    srtt_us: int
    """Smoothed round trip, at the end."""
    retransmits: int


@dataclass(slots=True, eq=False)
class Connection:
    """One connection from its first byte, or its refusal, to its end. Compared by being the same one."""

    direction: Literal["inbound", "outbound", "waypoint"]
    source: Peer
    destination: Peer
    started: float
    """Monotonic seconds."""
    destination_service: str = ""
    """`namespace/name`, empty when the caller dialled a workload's own address."""
    hbone_address: str = ""
    """`:authority` of the CONNECT."""
    request_id: str = ""
    bytes_sent: int = 0
    """By this proxy's workload, in either direction; final once closed, else see `meter`."""
    bytes_received: int = 0
    """By this proxy's workload."""
    flag: Flag = Flag.NONE
    error: str = ""
    policy: str = ""
    """The rule that refused."""
    audit: str = ""
    """The rule of an AUDIT policy that matches."""
    dry_run: str = ""
    """What would have been decided otherwise with the policies in dry run, and by which."""
    caller: str = ""
    """The SPIFFE ID that a waypoint says it connects for, when this proxy believes it."""
    meter: Meter | None = None
    """Where the two counts come from while the connection lives."""
    span: str = ""
    """Its id (16 hex digits) in the trace `request_id`, if this proxy records it."""
    parent_span: str = ""
    """The caller's span, if that is recorded."""
    native: Native | None = None
    """Set when it went direct: its ends are proven, and its bytes are not encrypted."""

    @property
    def destination_hostname(self) -> str:
        return host_of_key(self.destination_service)

    @property
    def traceparent(self) -> bytes:
        """What whoever is called next is told (W3C Trace Context), so that its span follows the last one recorded."""
        return trace.write(self.request_id, self.span, self.parent_span)

    def read_meter(self) -> None:
        """Brings the byte counts up to date."""
        if self.meter is not None:
            self.bytes_sent = self.meter.sent
            self.bytes_received = self.meter.received


@dataclass(frozen=True, slots=True)
class Listing:
    """The connections that live, as lines of the access log in JSON: the youngest of them, and how many there are."""

    total: int
    lines: list[str]


@dataclass(frozen=True, slots=True)
class Span:
    """A connection or request that is over, as a part of a trace."""

    trace: str
    id: str
    parent: str
    """The caller's span; empty where the trace begins."""
    name: str
    kind: Literal["client", "server"]
    started: float
    ended: float
    """Monotonic seconds, both."""
    fields: access_log.Fields
    error: str | None
    """Why it went wrong; None when it did not."""


class Spans(Protocol):
    """Where spans go."""

    def draws(self) -> bool:
        """Whether a trace begins with what begins here."""

    def add(self, span: Span) -> None: ...


class Telemetry:
    """The counters of one proxy. One thread; no call does I/O (the log buffers)."""

    def __init__(self, version: str, log: AccessLog | None = None) -> None:
        self.taps = Taps()
        self.spans: Spans | None = None
        """None: nothing is recorded."""
        self._log = log
        self._version = version
        self._live: dict[Connection, _Series] = {}
        self._series: dict[str, _Series] = {}
        # The key holds id()s of workloads, so the value holds the workloads: an id stays theirs.
        self._known: dict[_Key, tuple[_Series, Workload | None, Workload | None]] = {}
        self._registered: dict[str, tuple[str, str, Callable[[], float]]] = {}
        self._overflows = 0
        self._audited = 0
        self.gauge("uproxy_live_connections", "Connections being relayed", lambda: len(self._live))
        self.counter(
            "uproxy_telemetry_overflow_total",
            'Connections and requests counted with labels "unknown" because the table of label sets was full',
            lambda: self._overflows,
        )
        self.counter(
            "uproxy_audited_total",
            "Connections and requests that a policy with action AUDIT matches",
            lambda: self._audited,
        )
        if log is not None:
            self.counter(
                "uproxy_access_log_dropped_total",
                "Access log lines lost because the sink was slow or failed",
                lambda: log.dropped,
            )

    def gauge(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Adds a `uproxy_` gauge, read at each scrape. ValueError for a name that is taken or not of this form."""
        self._register(name, "gauge", help_text, read)

    def counter(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Adds a `uproxy_..._total` counter that somebody else keeps, read at each scrape. ValueError as above."""
        if not name.endswith("_total"):
            raise ValueError(f"{name}: a counter's name ends in _total")
        self._register(name, "counter", help_text, read)

    def opened(self, connection: Connection) -> None:
        """The connection is made, its bytes begin to flow."""
        series = self._find(connection, Flag.NONE, connection.started)
        series.opened += 1
        series.live += 1
        self._live[connection] = series
        if self.taps.watched or _access.isEnabledFor(logging.DEBUG):
            self._tell_opened(connection)

    def closed(self, connection: Connection, now: float) -> None:
        """The connection ended at `now` (monotonic seconds), or, when it was never opened, was refused or failed."""
        connection.read_meter()
        if connection.audit:
            self._audited += 1
        series = self._live.pop(connection, None)
        if series is None:
            self._find(connection, connection.flag, now).failed += 1
        else:
            series.live -= 1
            series.used = now
            received, sent = _by_requests(connection)
            series.received += received
            series.sent += sent
            if connection.flag is not Flag.NONE:
                series = self._find(connection, connection.flag, now)
            series.closed += 1
        if self._log is not None:
            self._log.record(connection, now)
        if connection.span and self.spans is not None:
            self.spans.add(_span(connection, now))
        if self.taps.watched:
            self.taps.note(
                access_log.COMPLETE,
                access_log.level_of(connection),
                lambda field: access_log.fields_so_far(connection, now, field),
            )

    def handed_over(self, connection: Connection) -> None:
        """Another process carries this connection on, and counts and logs it."""
        self._live.pop(connection).live -= 1

    def follow(self, connection: Connection, caller_span: str) -> None:
        """The caller records this connection, so we do, if we record anything."""
        connection.parent_span = caller_span
        if self.spans is not None:
            connection.span = os.urandom(8).hex()

    def _tell_opened(self, connection: Connection) -> None:
        def fields(field: access_log.Field) -> list[str]:
            return access_log.fields_when_opened(connection, field)

        if self._log is not None and _access.isEnabledFor(logging.DEBUG):
            self._log.note(access_log.OPENED, "debug", fields)
        if self.taps.watched:
            self.taps.note(access_log.OPENED, "debug", fields)

    def live(self, now: float, wall: float) -> Listing:
        """What lives at `now` (monotonic seconds; `wall`: Unix time)."""
        youngest = heapq.nlargest(MAX_LISTED, self._live, key=lambda connection: connection.started)
        lines = []
        for connection in youngest:
            connection.read_meter()
            fields = partial(access_log.fields_so_far, connection, now)
            lines.append(access_log.json_line(access_log.LIVES, "info", fields, wall))
        return Listing(len(self._live), lines)

    def render(self) -> bytes:
        """Everything, in Prometheus' text format 0.0.4."""
        return "\n".join([*self.istio_lines(), *self._registered_lines(), ""]).encode("utf-8", "backslashreplace")

    def istio_lines(self) -> Iterator[str]:
        """The metrics that have Istio's names, and lines that tell what they are."""
        live: dict[_Series, tuple[int, int]] = {}
        for connection, series in self._live.items():
            connection.read_meter()
            received, sent = live.get(series, (0, 0))
            more_received, more_sent = _by_requests(connection)
            live[series] = (received + more_received, sent + more_sent)
        for name, help_text, value_of in _METRICS:
            yield f"# HELP {name} {help_text}"
            yield f"# TYPE {name} counter"
            for series in self._series.values():
                value = value_of(series, live.get(series, (0, 0)))
                # A series at 0 from the start lets rate() see its first step. Refusals make no such four.
                if value or (series.opened and name != FAILED):
                    yield f"{name}{{{series.labels}}} {value}"
        yield f"# HELP {BUILD} Istio component build info"
        yield f"# TYPE {BUILD} gauge"
        yield f'{BUILD}{{component="uproxy",tag="{escaped(self._version)}"}} 1'

    def _registered_lines(self) -> Iterator[str]:
        for name, (kind, help_text, read) in self._registered.items():
            yield f"# HELP {name} {help_text}"
            yield f"# TYPE {name} {kind}"
            try:
                yield f"{name} {read()!r}"
            except Exception:  # one broken gauge must not cost the scrape
                _log.exception("metric %s cannot be read", name)
                yield f"{name} NaN"

    def _register(self, name: str, kind: str, help_text: str, read: Callable[[], float]) -> None:
        if not _NAME.fullmatch(name) or name in self._registered or "\n" in help_text:
            raise ValueError(f"{name}: not a new name of the form uproxy_like_this, with one line of help")
        self._registered[name] = (kind, help_text, read)

    def _find(self, connection: Connection, flag: Flag, now: float) -> _Series:
        source, destination = connection.source, connection.destination
        key = (
            connection.direction,
            id(source.workload),
            source.identity,
            id(destination.workload),
            destination.identity,
            connection.destination_service,
            flag,
            connection.native is None,
        )
        known = self._known.get(key)
        if known is not None:
            series = known[0]
        else:
            labels = _labels(connection, flag)
            found = self._series.get(labels)
            if found is None:
                if len(self._series) >= MAX_SERIES and not self._evict(now):
                    self._overflows += 1
                    return self._overflow(connection, flag)
                found = self._series[labels] = _Series(labels)
            series = found
            if len(self._known) >= 2 * MAX_SERIES:
                self._known.clear()
            self._known[key] = (series, source.workload, destination.workload)
        series.used = now
        return series

    def _evict(self, now: float) -> bool:
        idle = [key for key, series in self._series.items() if not series.live and now - series.used >= IDLE_S]
        for key in idle:
            del self._series[key]
        if idle:
            self._known.clear()
        return bool(idle)

    def _overflow(self, connection: Connection, flag: Flag) -> _Series:
        """The series of everybody who found no place: at most two per flag, beyond the cap."""
        nobody = Peer("")
        labels = _labels(Connection(connection.direction, nobody, nobody, 0.0), flag)
        return self._series.setdefault(labels, _Series(labels))


class _Series:
    """The counts under one label set."""

    __slots__ = ("closed", "failed", "labels", "live", "opened", "received", "sent", "used")

    def __init__(self, labels: str) -> None:
        self.labels = labels
        self.opened = self.closed = self.failed = self.received = self.sent = 0
        self.live = 0
        self.used = 0.0


def _span(connection: Connection, now: float) -> Span:
    return Span(
        trace=connection.request_id,
        id=connection.span,
        parent=connection.parent_span,
        name=connection.destination_hostname if connection.destination_service else connection.direction,
        kind="client" if connection.direction == "outbound" else "server",
        started=connection.started,
        ended=now,
        fields=partial(access_log.fields_so_far, connection, now),
        error=connection.error if connection.flag is not Flag.NONE else None,
    )


_REPORTERS: Final = {"outbound": "source", "inbound": "destination", "waypoint": "waypoint"}

_Key = tuple[str, int, str, int, str, str, Flag, bool]

_METRICS: Final[tuple[tuple[str, str, Callable[[_Series, tuple[int, int]], int]], ...]] = (
    (OPENED, "The total number of TCP connections opened", lambda series, live: series.opened),
    (CLOSED, "The total number of TCP connections closed", lambda series, live: series.closed),
    (FAILED, "The total number of TCP connections that failed to establish", lambda series, live: series.failed),
    (
        RECEIVED,
        "The size of total bytes received during request in case of a TCP connection",
        lambda series, live: series.received + live[0],
    ),
    (
        SENT,
        "The size of total bytes sent during response in case of a TCP connection",
        lambda series, live: series.sent + live[1],
    ),
)


def _by_requests(connection: Connection) -> tuple[int, int]:
    """Bytes received and sent as Istio means it, at both reporters: from the caller, and to the caller."""
    if connection.direction == "outbound":
        return connection.bytes_sent, connection.bytes_received
    return connection.bytes_received, connection.bytes_sent


def _labels(connection: Connection, flag: Flag) -> str:
    """Istio's labels in Istio's order (STANDARDS 5.6)."""
    outbound = connection.direction == "outbound"
    namespace, _, name = connection.destination_service.partition("/")
    proven = connection.destination.identity if outbound else connection.source.identity
    values = [
        ("reporter", _REPORTERS[connection.direction]),
        *peer_labels("source", connection.source),
        ("destination_service", connection.destination_hostname if name else ""),
        ("destination_service_namespace", namespace),
        ("destination_service_name", name),
        *peer_labels("destination", connection.destination),
        ("request_protocol", "tcp"),
        ("response_flags", flag.value),
        ("connection_security_policy", _security_policy(connection, proven)),
    ]
    return ",".join(f'{label}="{escaped(value or UNKNOWN)}"' for label, value in values)


def _security_policy(connection: Connection, proven: str) -> str:
    if connection.native is not None:
        return "none"
    return "mutual_tls" if proven else UNKNOWN


def peer_labels(side: str, peer: Peer) -> list[tuple[str, str]]:
    """Istio's labels of one end, in Istio's order; what is not known is empty."""
    workload = peer.workload
    return [
        (f"{side}_workload", workload.name if workload else ""),
        (f"{side}_canonical_service", workload.canonical_service if workload else ""),
        (f"{side}_canonical_revision", workload.canonical_revision if workload else ""),
        (f"{side}_workload_namespace", workload.namespace if workload else ""),
        (f"{side}_principal", peer.identity),
        (f"{side}_app", workload.app if workload else ""),
        (f"{side}_version", workload.version if workload else ""),
        (f"{side}_cluster", ""),
    ]


def escaped(value: str) -> str:
    """A label's value in Prometheus' text format."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
