"""Spans of connections and requests, to an OpenTelemetry collector: OTLP 1.x over HTTP, in JSON.

Loaded only where --otlp names one. A span is encoded as soon as what it is about has ended; spans wait in a bounded
queue and are posted each second. A collector that is away costs the spans that do not fit, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from json.encoder import encode_basestring_ascii as quoted
from typing import Final

from uproxy.access_log import MAX_VALUE
from uproxy.telemetry import Span

MAX_QUEUED: Final = 2048
"""Spans that wait; the default of OpenTelemetry's SDKs. Beyond, new ones are dropped."""
MAX_BATCH: Final = 512
"""Spans of one request, some 600 KiB."""
INTERVAL_S: Final = 1.0
TIMEOUT_S: Final = 5.0
"""For one request, from dialling to the end of its answer."""
LONGEST_PAUSE_S: Final = 30.0
"""Between two attempts to reach a collector; it is INTERVAL_S at first, and doubled by each that fails."""
MAX_ANSWER: Final = 64 * 1024

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})[ \r]")
_RETRIABLE: Final = (429, 502, 503, 504)  # OTLP specification, "Failures"
_KINDS: Final = {"server": 2, "client": 3}  # opentelemetry/proto/trace/v1/trace.proto
_STATUS_ERROR: Final = 2

Dial = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]

log = logging.getLogger(__name__)


class Exporter:
    """The spans of one process on their way to one collector. `sent` and `dropped` count spans."""

    def __init__(self, dial: Dial, authority: str, share: float, service: Callable[[], str], version: str) -> None:
        """`share`: of the connections that begin here, how many are recorded, from 0 to 1; who is called follows its
        caller. `service`: the `service.name` of this process' spans.
        """
        self.sent = 0
        self.dropped = 0
        self._dial = dial
        self._authority = authority
        self._share = share
        self._service = service
        self._scope = f'{{"name":"uproxy","version":{quoted(version)}}}'
        self._spans: deque[str] = deque()
        self._in_flight = 0
        self._failing = False

    def draws(self) -> bool:
        """Whether what begins here is recorded."""
        return random.random() < self._share

    def add(self, span: Span) -> None:
        """Something that is recorded is over, just now."""
        if len(self._spans) + self._in_flight >= MAX_QUEUED:
            self.dropped += 1
        else:
            self._spans.append(_encoded(span, time.monotonic(), time.time()))

    async def run(self) -> None:
        """Post what waits, until cancelled."""
        pause_s = INTERVAL_S
        while True:
            await asyncio.sleep(pause_s)
            try:
                while self._spans and await self._post():
                    pause_s = INTERVAL_S
            except Exception:  # a bug of ours, which must not end the proxy
                log.exception("spans cannot be posted")
            if self._spans:
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def finish(self, within_s: float) -> None:
        """This process ends: post what waits, for so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._spans and await self._post():
                    pass
        self.dropped += len(self._spans)
        self._spans.clear()

    async def _post(self) -> bool:
        """One batch. Whether the collector dealt with it; if it could not now, the spans wait on."""
        batch = [self._spans.popleft() for _ in range(min(MAX_BATCH, len(self._spans)))]
        self._in_flight = len(batch)
        again = True
        try:
            status = await self._request(self._body(batch))
            again = status in _RETRIABLE
            if 200 <= status < 300:
                self.sent += len(batch)
                self._note("")
            else:
                self._note(f"answers {status}")
                self.dropped += 0 if again else len(batch)
        except (OSError, ValueError) as error:  # TimeoutError too; ValueError also for a line that is too long
            self._note(str(error) or f"no answer within {TIMEOUT_S:g} s")
        finally:
            self._in_flight = 0
            if again:
                self._spans.extendleft(reversed(batch))
        return not again

    async def _request(self, body: bytes) -> int:
        """The status that a POST is answered with. Raises OSError or ValueError."""
        head = (
            f"POST /v1/traces HTTP/1.1\r\nhost: {self._authority}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        async with asyncio.timeout(TIMEOUT_S):
            reader, writer = await self._dial()
            try:
                writer.write(head.encode("ascii") + body)
                await writer.drain()
                answered = _STATUS_LINE.match(await reader.readline())
                if answered is None:
                    raise ValueError("its answer is not HTTP/1.1")
                await reader.read(MAX_ANSWER)  # so that closing is not a reset
                return int(answered[1])
            finally:
                writer.close()

    def _body(self, batch: list[str]) -> bytes:
        attribute = f'{{"key":"service.name","value":{{"stringValue":{quoted(self._service())}}}}}'
        return (
            f'{{"resourceSpans":[{{"resource":{{"attributes":[{attribute}]}},"scopeSpans":[{{"scope":{self._scope},'
            f'"spans":[{",".join(batch)}]}}]}}]}}'
        ).encode("ascii")

    def _note(self, problem: str) -> None:
        """Tells the log when it begins to fail, and when it works again."""
        if problem and not self._failing:
            log.warning("spans: the collector %s: %s; up to %d wait", self._authority, problem, MAX_QUEUED)
        elif self._failing and not problem:
            log.info("spans: the collector %s works again", self._authority)
        self._failing = bool(problem)


def nearby(host: str, port: int) -> Dial:
    """Dials a collector on loopback."""
    return lambda: asyncio.open_connection(host, port)


def tunnelled(serve: Callable[[socket.socket], None]) -> Dial:
    """Dials one that is a service of the mesh: `serve` is given the other end, as an application's connection."""

    async def dial() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        near = socket.socket()
        try:
            near.setblocking(False)
            with socket.create_server(("127.0.0.1", 0)) as listener:
                listener.setblocking(False)
                await loop.sock_connect(near, listener.getsockname())
                while True:
                    far, peer = await loop.sock_accept(listener)
                    if peer == near.getsockname():
                        break
                    far.close()  # somebody else on this host
            serve(far)
            return await asyncio.open_connection(sock=near)
        except BaseException:
            near.close()
            raise

    return dial


def _encoded(span: Span, now: float, wall: float) -> str:
    """`now`: monotonic seconds; `wall`: the same moment in Unix time."""
    began, ended = (int((wall - (now - moment)) * 1e9) for moment in (span.started, span.ended))
    parent = f'"parentSpanId":"{span.parent}",' if span.parent else ""
    status = ""
    if span.error is not None:
        status = f',"status":{{"code":{_STATUS_ERROR},"message":{quoted(span.error[:MAX_VALUE])}}}'
    return (
        f'{{"traceId":"{span.trace}","spanId":"{span.id}",{parent}"name":{quoted(span.name)},'
        f'"kind":{_KINDS[span.kind]},"startTimeUnixNano":"{began}","endTimeUnixNano":"{ended}",'
        f'"attributes":[{",".join(span.fields(_attribute))}]{status}}}'
    )


def _attribute(name: str, value: str | int) -> str:
    if isinstance(value, int):
        return f'{{"key":"{name}","value":{{"intValue":"{value}"}}}}'
    return f'{{"key":"{name}","value":{{"stringValue":{quoted(value[:MAX_VALUE])}}}}}'
