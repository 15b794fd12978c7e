"""The control plane's metrics: Prometheus' text format over HTTP (port 15014), to whoever reaches the port.

They count and name nobody, so that they need no secret. One request per connection, then `connection: close`, and what
was rendered serves everybody for a second, or for longer where it took long: asking often costs little.
"""

from __future__ import annotations

import asyncio
import bisect
import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

METRICS_PORT: Final = 15014
"""istiod's too (Istio: "Ports used by Istio")."""

MAX_CONNECTIONS: Final = 32
_MAX_HEAD: Final = 8 * 1024
_TIMEOUT_S: Final = 5.0
"""For the request to come, and again for the answer to be taken."""
_FRESH_S: Final = 1.0
_RESTS: Final = 20
"""How many times as long as counting everything took it then rests: 100,000 workloads take about a second."""
_BOUNDS_S: Final = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Of a change: of one resource, or of tens of thousands."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Durations:
    """A histogram."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS_S) + 1))
    """How many took at most the bound of the same place, and more than the one before; the last: more than all."""
    sum_s: float = 0.0

    def add(self, took_s: float) -> None:
        self.counts[bisect.bisect_left(_BOUNDS_S, took_s)] += 1
        self.sum_s += took_s


@dataclass(frozen=True, slots=True)
class Values:
    """Everything there is to tell, as of now."""

    requests: Mapping[tuple[str, int], int]
    """(path, status) -> how many were answered so on the operators' socket."""
    changes: Durations
    published: int
    """Messages that the broker has acknowledged."""
    issued: int
    refused: Mapping[int, int]
    """Status -> requests for a certificate that were refused so."""
    connected: bool
    settled: bool
    """Whether the broker has acknowledged all there is to publish."""
    epoch: int
    version: int
    live: int
    """Records that are retained."""
    deleted: int
    """Tombstones likewise."""
    proxies: Mapping[str, int]
    """State -> how many."""
    bindings: Mapping[str, int]
    """Phase -> how many."""
    problems: int


def render(values: Values) -> bytes:
    """The text that Prometheus reads."""
    lines: list[str] = []

    def add(name: str, kind: str, about: str, samples: Iterable[tuple[str, float]]) -> None:
        lines.extend((f"# HELP {name} {about}", f"# TYPE {name} {kind}"))
        lines.extend(f"{name}{suffix} {value}" for suffix, value in samples)

    add(
        "uproxy_control_requests_total",
        "counter",
        "Requests of operators that were answered.",
        [(f'{{path="{path}",code="{code}"}}', count) for (path, code), count in sorted(values.requests.items())],
    )
    add(
        "uproxy_control_change_duration_seconds",
        "histogram",
        "Time that changes of resources took.",
        _buckets(values.changes),
    )
    add(
        "uproxy_control_messages_published_total",
        "counter",
        "Messages that the broker has acknowledged.",
        [("", values.published)],
    )
    add("uproxy_control_certificates_issued_total", "counter", "Certificates given out.", [("", values.issued)])
    add(
        "uproxy_control_certificates_refused_total",
        "counter",
        "Requests for a certificate that were refused.",
        [(f'{{code="{code}"}}', count) for code, count in sorted(values.refused.items())],
    )
    add("uproxy_control_broker_connected", "gauge", "Whether a broker is connected.", [("", int(values.connected))])
    add(
        "uproxy_control_published",
        "gauge",
        "Whether the broker has acknowledged all there is to publish.",
        [("", int(values.settled))],
    )
    add("uproxy_control_epoch", "gauge", "Epoch of the last change.", [("", values.epoch)])
    add("uproxy_control_version", "gauge", "Version of the last change, within the epoch.", [("", values.version)])
    add(
        "uproxy_control_records",
        "gauge",
        "Records that the broker should retain.",
        [('{state="live"}', values.live), ('{state="deleted"}', values.deleted)],
    )
    add("uproxy_control_proxies", "gauge", "Proxies by state.", _by("state", values.proxies))
    add("uproxy_control_bindings", "gauge", "Bindings to waypoints by phase.", _by("phase", values.bindings))
    add("uproxy_control_problems", "gauge", "Problems that `meshctl status` shows.", [("", values.problems)])
    return "".join(f"{line}\n" for line in lines).encode()


def _by(label: str, counts: Mapping[str, int]) -> list[tuple[str, float]]:
    return [(f'{{{label}="{value}"}}', count) for value, count in counts.items()]


def _buckets(durations: Durations) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip((*map(str, _BOUNDS_S), "+Inf"), durations.counts, strict=True):
        total += count
        found.append((f'_bucket{{le="{bound}"}}', total))
    return [*found, ("_sum", durations.sum_s), ("_count", total)]


def counted(values: Iterable[str], found: Iterable[str]) -> dict[str, int]:
    """Each of `values` -> how often it was found; those that were not with 0, so that no series comes and goes."""
    counts = Counter(found)
    return {value: counts[value] for value in values}


class MetricsServer:
    """Answers `GET /metrics`."""

    def __init__(self, values: Callable[[], Values]) -> None:
        """`values` is called in a thread."""
        self._values = values
        self._turn = asyncio.Lock()
        self._rendered = b""
        self._until = 0.0
        self._open = 0

    async def run(self, listening: socket.socket) -> None:
        """Serve a listening socket until cancelled."""
        server = await asyncio.start_server(self._connected, sock=listening, limit=_MAX_HEAD)
        async with server:
            await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= MAX_CONNECTIONS:
                async with asyncio.timeout(_TIMEOUT_S):
                    head = await reader.readuntil(b"\r\n\r\n")
                writer.write(await self._answer(head))
                async with asyncio.timeout(_TIMEOUT_S):
                    await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # TimeoutError is an OSError; nobody is there to be told
        finally:
            self._open -= 1
            writer.close()

    async def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        target, _, version = rest.partition(b" ")
        if version not in (b"HTTP/1.1", b"HTTP/1.0"):
            return _response("400 Bad Request", b"no HTTP/1.1\n")
        if target.partition(b"?")[0] != b"/metrics":
            return _response("404 Not Found", b"there is GET /metrics\n")
        if method != b"GET":
            return _response("405 Method Not Allowed", b"there is GET /metrics\n", "allow: GET\r\n")
        try:
            return _response("200 OK", await self._text())
        except Exception:
            _log.exception("metrics failed")
            return _response("500 Internal Server Error", b"the control plane's log says why\n")

    async def _text(self) -> bytes:
        loop = asyncio.get_running_loop()
        async with self._turn:
            began = loop.time()
            if began >= self._until:
                self._rendered = render(await asyncio.to_thread(self._values))
                self._until = loop.time() + max(_FRESH_S, _RESTS * (loop.time() - began))
            return self._rendered


def _response(status: str, body: bytes, more: str = "") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\ncontent-type: text/plain; version=0.0.4; charset=utf-8\r\n"
        f"content-length: {len(body)}\r\ncache-control: no-store\r\nconnection: close\r\n{more}\r\n"
    )
    return head.encode("ascii") + body
